from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register
from .base import Memory


@register("efsignsgd")
@dataclass(frozen=True)
class EFSignSGDMemory(Memory):
    """Error feedback in units of the update: the current learning rate is inside of what is compressed.

    p = e + lr g;  e <- p - C(p);  result mean_i C(p_i) / lr, which the optimizer multiplies with lr again: x <- x - mean_i C(p_i).
    The same as 'residual' while lr is constant. Where lr changes, what is left over keeps the size of the update that it was part of,
    instead of growing or shrinking with lr. lr is read at every step, the first included; one with lr = 0 gives zeros and leaves the state.
    State: `residual`, float[d], zero at first, in units of the update. Needs the learning rate (LearningRateError). For SGD, with or
    without the optimizer's momentum; not with votes. Source: Karimireddy, Rebjock, Stich, Jaggi 2019. GRACE leaves lr out of the first
    step, freezes it when it is made, and in its torch form adds the ranks up.
    """

    feeds_back: ClassVar[bool] = True
    in_updates: ClassVar[bool] = True
    uses_lr: ClassVar[bool] = True

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        rate = self.learning_rate(info)
        return state["residual"] + grad * rate if rate else ops.zeros(spec.size)

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)} if self.learning_rate(info) else {}

    def on_aggregate(self, ops, mean, spec, info, state):
        rate = self.learning_rate(info)
        return (mean / rate if rate else ops.zeros(spec.size)), {}
