from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory


@register("dist_ef_block")
@dataclass(frozen=True)
class DistEFBlock(Memory):
    """Rescales the residual when the learning rate changes, and can add each rank's own momentum (the rank's part of dist-EF-blockSGD).

    m <- mu m + g;  p = m + (lr_before / lr) e,  with nesterov  p = (g + mu m) + (lr_before / lr) e;  e <- p - C(p);  result mean_i C(p_i).
    lr_before is the learning rate of the step before. Without momentum (mu = 0) p = g + (lr_before / lr) e, and the optimizer may have its
    own momentum. With compressor efsignsgd(block=...) and communicator reduce_scatter(follow_rate=True) this is the complete two-way
    algorithm: each rank is the server of its shard, adds that shard's residual times lr_before / lr, compresses the mean again, and sends
    it to all.
    State: `rated_residual` (e), float[d], zero at first, in units of the gradient at the rate `residual_rate`, float[1]; `own_momentum`
    (m), float[d], if mu > 0. Needs the learning rate (LearningRateError). A step with lr = 0 returns zeros and leaves the state unchanged.
    Not for votes.
    Source: Zheng, Huang, Kwok 2019, algorithms 2 and 3.
    """

    feeds_back: ClassVar[bool] = True
    uses_lr: ClassVar[bool] = True
    shared_state: ClassVar[tuple[str, ...]] = ("residual_rate",)
    unsent_key: ClassVar[str] = "rated_residual"
    momentum: float = knob(0.0, "fraction of the momentum that is kept per step", low=0, high=0.9999, headline=True)
    nesterov: bool = knob(False, "use Nesterov momentum, which looks one step ahead")

    @property
    def is_momentum(self) -> bool:  # type: ignore[override]
        return self.momentum > 0

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        state = {"rated_residual": ops.zeros(spec.size), "residual_rate": ops.zeros(1)}
        return {**state, "own_momentum": ops.zeros(spec.size)} if self.momentum else state

    def absorb(self, ops, grad, spec, info, state):
        if not self.momentum or not self.learning_rate(info):
            return {}
        return {"own_momentum": ops.cast(state["own_momentum"] * self.momentum + grad, "float32")}

    def before(self, ops, grad, spec, info, state):
        if not self.learning_rate(info):
            return ops.zeros(spec.size)
        if self.momentum:
            grad = grad + state["own_momentum"] * self.momentum if self.nesterov else state["own_momentum"]
        return grad + state["rated_residual"] * self.rate_change(float(state["residual_rate"][0]), info)

    def after(self, ops, compensated, sent, spec, info, state):
        rate = self.learning_rate(info)
        if not rate:
            return {}
        return {"rated_residual": self.unsent(ops, compensated, sent), "residual_rate": ops.zeros(1) + rate}

    def on_aggregate(self, ops, mean, spec, info, state):
        return (mean if self.learning_rate(info) else ops.zeros(spec.size)), {}
