from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.ops import Feedback
from ..parts.part import knob
from ..parts.requests import Together
from . import register
from .base import Memory


def whole_norm(norms):
    """Returns the norm of the whole model, once for each of its tensors."""
    return [math.sqrt(math.fsum(norm * norm for norm in norms))] * len(norms)


def masked(ops, momentum, sent):
    """Sets the momentum to zero where something was sent, in place, and returns it; unchanged if every element was sent."""
    positions = sent.positions()
    if positions is not None:
        momentum[positions] = 0
    return momentum


@register("dgc")
@dataclass(frozen=True)
class DGC(Memory):
    """Accumulates each rank's own momentum before compression, and sends selected elements of the sum (momentum correction).

    u <- m u + g;  p = v + u;  with nesterov  p = v + (g + m u);
    v <- p - C(p);  u <- 0 where something was sent (masking);  result mean_i C(p_i), to be applied without momentum.
    C(p) is what was really sent, so v keeps the rounding of 16-bit values. A tensor that was sent dense is not masked: then the result is
    the momentum of the mean gradient.
    State: `own_momentum` (u) and `residual` (v), float[d], zero at first. Needs a compressor that picks positions, and an optimizer without
    momentum.
    m (`momentum`): as for SGD. With masking=False, momentum that was already sent continues to act (staleness).
    clipping: each rank rescales its gradient so that its norm over the WHOLE model is at most clipping / sqrt(n), n ranks. Too low slows
    training down, too high has no effect, None does not clip. With clipping, all parameters travel in one bucket.
    Source: Lin et al. 2018. GRACE clamps elements at the norm of a tensor, and its clipping fails in one of its versions; the authors'
    code clears v before it rounds values to 16 bits.
    """

    feeds_back: ClassVar[bool] = True
    is_momentum: ClassVar[bool] = True
    momentum: float = knob(0.9, "fraction of the momentum that is kept per step", low=0, high=0.9999, headline=True)
    nesterov: bool = knob(False, "use Nesterov momentum, which looks one step ahead")
    masking: bool = knob(True, "set the momentum to zero where something was sent")
    clipping: float | None = knob(None, "limit of a rank's gradient norm over the whole model, times sqrt(n)", above=0, kind=float)

    @property
    def whole_model(self) -> bool:  # type: ignore[override]
        return self.clipping is not None

    def check(self, compressor):
        self.needs_positions(compressor)

    def init(self, ops, spec, info):
        return {"own_momentum": ops.zeros(spec.size), "residual": ops.zeros(spec.size)}

    def exchange(self, ops, send, grad, spec, info, state):
        if self.clipping is not None:
            norm = yield Together(float(ops.block_norms(grad, spec.size, 2)[0]), whole_norm)
            limit = self.clipping / math.sqrt(info.size)
            if not norm <= limit:  # a NaN norm makes all of grad NaN, which is detected later
                grad = grad * float(np.float32(limit / norm))
        return (yield from super().exchange(ops, send, grad, spec, info, state))

    def absorb(self, ops, grad, spec, info, state):
        return {"own_momentum": ops.cast(ops.sum_up(Feedback(state["own_momentum"], self.momentum), grad), "float32")}

    def before(self, ops, grad, spec, info, state):
        step = grad + state["own_momentum"] * self.momentum if self.nesterov else state["own_momentum"]
        return ops.sum_up(Feedback(state["residual"]), step)

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent), **self.marked(ops, sent, state)}

    def feedback(self, state):
        return None if self.nesterov or self.clipping is not None else Feedback(state["residual"])

    def incoming(self, grad, state):
        return state["own_momentum"]

    def marked(self, ops, sent, state):
        return {"own_momentum": masked(ops, state["own_momentum"], sent) if self.masking else state["own_momentum"]}
