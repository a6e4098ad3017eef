from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory


@register("dist_ef_block")
@dataclass(frozen=True)
class DistEFBlock(Memory):
    """Error feedback that follows the learning rate, with a momentum of the rank's own: a worker's part of dist-EF-blockSGD.

    m <- mu m + g;  p = m + (lr_before / lr) e,  with nesterov  p = (g + mu m) + (lr_before / lr) e;  e <- p - C(p);  result mean_i C(p_i).
    lr_before is the rate of the step before. Without momentum (mu = 0) p = g + (lr_before / lr) e, and the optimizer may have its own.
    With compressor efsignsgd(block=...) over reduce_scatter(follow_rate=True) it is the whole two-way algorithm: each rank is the server of
    its shard, adds that shard's error of the steps before, times lr_before / lr, compresses the mean again, and sends it to all.
    State: `residual` (e), float[d], zero at first, in units of the gradient; `residual_rate`, float[1], the rate it belongs to; `momentum`,
    float[d], where mu > 0. Needs the learning rate (LearningRateError). A step with lr = 0 gives zeros and leaves the state. Not for votes.
    Source: Zheng, Huang, Kwok 2019, algorithms 2 and 3.
    """

    feeds_back: ClassVar[bool] = True
    uses_lr: ClassVar[bool] = True
    shared_state: ClassVar[tuple[str, ...]] = ("residual_rate",)
    momentum: float = knob(0.0, "how much of the momentum is kept at every step", low=0, high=0.9999, headline=True)
    nesterov: bool = knob(False, "look one step ahead")

    @property
    def is_momentum(self) -> bool:  # type: ignore[override]
        return self.momentum > 0

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        state = {"residual": ops.zeros(spec.size), "residual_rate": ops.zeros(1)}
        return {**state, "momentum": ops.zeros(spec.size)} if self.momentum else state

    def absorb(self, ops, grad, spec, info, state):
        if not self.momentum or not self.learning_rate(info):
            return {}
        return {"momentum": ops.cast(state["momentum"] * self.momentum + grad, "float32")}

    def before(self, ops, grad, spec, info, state):
        if not self.learning_rate(info):
            return ops.zeros(spec.size)
        if self.momentum:
            grad = grad + state["momentum"] * self.momentum if self.nesterov else state["momentum"]
        return grad + state["residual"] * self.rate_change(float(state["residual_rate"][0]), info)

    def after(self, ops, compensated, sent, spec, info, state):
        rate = self.learning_rate(info)
        if not rate:
            return {}
        return {"residual": self.unsent(ops, compensated, sent), "residual_rate": ops.zeros(1) + rate}

    def on_aggregate(self, ops, mean, spec, info, state):
        return (mean if self.learning_rate(info) else ops.zeros(spec.size)), {}
