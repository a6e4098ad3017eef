from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register
from .base import Memory


@register("efsignsgd")
@dataclass(frozen=True)
class EFSignSGDMemory(Memory):
    """Multiplies the gradient by the learning rate before compression, so that the residual is in units of the update (error feedback).

    p = e + lr g;  e <- p - C(p);  result mean_i C(p_i) / lr, which the optimizer multiplies by lr again: x <- x - mean_i C(p_i).
    It equals 'residual' while lr is constant. If lr changes, the residual keeps the size of the update that it was part of, instead of
    growing or shrinking with lr. lr is read at every step, including the first; a step with lr = 0 returns zeros and leaves the state
    unchanged.
    State: `update_residual`, float[d], zero at first, in units of the update. Needs the learning rate (LearningRateError). For SGD, with or
    without the optimizer's momentum; not for votes. Source: Karimireddy, Rebjock, Stich, Jaggi 2019. GRACE omits lr at the first step,
    freezes it at construction, and in its torch version sums over the ranks.
    """

    feeds_back: ClassVar[bool] = True
    in_updates: ClassVar[bool] = True
    uses_lr: ClassVar[bool] = True
    unsent_key: ClassVar[str] = "update_residual"

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        return {"update_residual": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        rate = self.learning_rate(info)
        return state["update_residual"] + grad * rate if rate else ops.zeros(spec.size)

    def after(self, ops, compensated, sent, spec, info, state):
        return {"update_residual": self.unsent(ops, compensated, sent)} if self.learning_rate(info) else {}

    def on_aggregate(self, ops, mean, spec, info, state):
        rate = self.learning_rate(info)
        return (mean / rate if rate else ops.zeros(spec.size)), {}
