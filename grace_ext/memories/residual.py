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
    """Adds what was not sent to the next gradient (error feedback).

    p = beta e + gamma g;  e <- p - C(p), where C(p) is what was really sent, 16-bit rounding included.
    State: `residual`, float[d], zero at first, in units of the gradient. With beta below 1 old error fades (a leak); gamma scales the
    gradient. Source: Seide et al. 2014; Karimireddy et al. 2019. No differences to them: with beta = gamma = 1, sent + e = g + e_old
    exactly, if each term is representable.
    """

    feeds_back: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    beta: float = knob(1.0, "fraction of the residual that is kept; below 1 old error fades", low=0, high=1)
    gamma: float = knob(1.0, "factor that the gradient is multiplied by", above=0, high=1e6)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)}

    def feedback(self, state):
        return Feedback(state["residual"], self.beta, self.gamma)

    def before(self, ops, grad, spec, info, state):
        return ops.sum_up(self.feedback(state), grad)

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)}
