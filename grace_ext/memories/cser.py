from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory


@register("cser")
@dataclass(frozen=True)
class CSER(Memory):
    """Applies what was not sent to this rank's own model at once, and brings the ranks' models together periodically (error reset).

    Every step:              e_i <- e_i + lr (g_i - C(g_i));   result_i = mean_j C(g_j) + (g_i - C(g_i)), different on each rank.
    Every `reset_period` steps also:  result_i += (mean_j C(e_j) - C(e_i)) / lr;   e_i <- e_i - C(e_i).
    SGD without momentum (x_i <- x_i - lr result_i) keeps x_i + e_i the same on all ranks; x_i alone differs by what is not sent yet.
    (The paper's sign convention is x_i - e_i.) With momentum this is not exact.
    The gradient is never delayed, but the models differ, so only LocalCluster, whose step returns each rank's mapping, and wrappers that
    average models accept this memory; everything else raises an error. A reset step sends the tensor twice.
    State: `cser_residual` (e_i), float[d], zero at first, in units of the update, so lr may change. Needs lr (LearningRateError). A step
    with lr = 0 returns zeros and leaves the state unchanged.
    A longer period costs less and lets the models drift further apart. Works with any compressor but votes; with shared positions
    (randblock, randomk) both sums are all-reduces. Source: Xie et al. 2020, algorithm 2 (CSER).
    """

    in_updates: ClassVar[bool] = True
    uses_lr: ClassVar[bool] = True
    diverges: ClassVar[bool] = True
    sends: ClassVar[int] = 2
    unsent_key: ClassVar[str] = "cser_residual"
    reset_period: int = knob(8, "steps from one error reset to the next", low=1, high=10**9, headline=True)

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        return {"cser_residual": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return grad

    def after(self, ops, compensated, sent, spec, info, state):
        rate = self.learning_rate(info) * info.size / info.divisor  # a sum moves the model n times as far as a mean
        return {"cser_residual": ops.cast(state["cser_residual"] + (compensated - sent.values()) * rate, "float32")}

    def exchange(self, ops, send, grad, spec, info, state):
        rate, scale = self.learning_rate(info), info.size / info.divisor
        done = yield from send(grad)
        kept = self.after(ops, grad, done, spec, info, state)
        output = done.aggregate + (grad - done.values()) * scale
        changes = [done.state, kept]
        if (info.step + 1) % self.reset_period == 0:
            again = yield from send(kept["cser_residual"])
            own = again.values()
            if rate:
                output = output + (again.aggregate / scale - own) / rate
            changes += [again.state, {"cser_residual": ops.cast(kept["cser_residual"] - own, "float32")}]
        return (output, *changes) if rate else (ops.zeros(spec.size), {})
