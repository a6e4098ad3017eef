from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.ops import Feedback
from ..parts.part import knob
from . import register
from .base import Memory


@register("residual")
@dataclass(frozen=True)
class Residual(Memory):
    """Error feedback: what was not sent is added to the next gradient.

    p = beta e + gamma g;  e <- p - C(p), where C(p) is what was really sent, 16-bit rounding included.
    State: `residual`, float[d], zero at first, in units of the gradient. beta under 1 forgets old error (a leak); gamma scales the
    gradient. Source: Seide et al. 2014; Karimireddy et al. 2019. Differs from nothing: with beta = gamma = 1, sent + e = g + e_old exactly
    where each is representable.
    """

    feeds_back: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    beta: float = knob(1.0, "how much of the residual is kept; under 1 old error fades", low=0, high=1)
    gamma: float = knob(1.0, "factor of the gradient", above=0, high=1e6)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)}

    def feedback(self, state):
        return Feedback(state["residual"], self.beta, self.gamma)

    def before(self, ops, grad, spec, info, state):
        return ops.sum_up(self.feedback(state), grad)

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)}
