from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory


@register("cser")
@dataclass(frozen=True)
class CSER(Memory):
    """Error reset: what is not sent is applied at once, to this rank's own model, and the models are drawn together from time to time.

    Every step:              e_i <- e_i + lr (g_i - C(g_i));   result_i = mean_j C(g_j) + (g_i - C(g_i)), this rank's own.
    Every `reset_period` steps also:  result_i += (mean_j C(e_j) - C(e_i)) / lr;   e_i <- e_i - C(e_i).
    The optimizer (SGD without momentum: x_i <- x_i - lr result_i) keeps x_i + e_i the same on all ranks; x_i alone differs by what is
    not sent yet. (In the paper's signs x_i - e_i.) With momentum it is not exact.
    The gradient is never delayed, but the models differ: for LocalCluster, whose step returns each rank's mapping, and for wrappers
    that average models; everything else refuses it. On a reset step the tensor is sent twice.
    State: `residual` (e_i), float[d], zero at first, in units of the update, so lr may change; needs it (LearningRateError). A step with
    lr = 0 gives zeros and leaves the state.
    A longer period costs less and lets the models drift further apart. Any compressor but votes; shared positions (randblock, randomk)
    make both sums all-reduces. Source: Xie et al. 2020, algorithm 2 (CSER).
    """

    in_updates: ClassVar[bool] = True
    uses_lr: ClassVar[bool] = True
    diverges: ClassVar[bool] = True
    sends: ClassVar[int] = 2
    reset_period: int = knob(8, "steps from one error reset to the next", low=1, high=10**9, headline=True)

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return grad

    def after(self, ops, compensated, sent, spec, info, state):
        rate = self.learning_rate(info) * info.size / info.divisor  # a sum moves the model n times as far as a mean
        return {"residual": ops.cast(state["residual"] + (compensated - sent.values()) * rate, "float32")}

    def exchange(self, ops, send, grad, spec, info, state):
        rate, scale = self.learning_rate(info), info.size / info.divisor
        done = yield from send(grad)
        kept = self.after(ops, grad, done, spec, info, state)
        output = done.aggregate + (grad - done.values()) * scale
        changes = [done.state, kept]
        if (info.step + 1) % self.reset_period == 0:
            again = yield from send(kept["residual"])
            own = again.values()
            if rate:
                output = output + (again.aggregate / scale - own) / rate
            changes += [again.state, {"residual": ops.cast(kept["residual"] - own, "float32")}]
        return (output, *changes) if rate else (ops.zeros(spec.size), {})
