from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register
from .base import Memory
from .momentum import momentum_knob


@register("momentum_compression")
@dataclass(frozen=True)
class MomentumCompression(Memory):
    """Compresses the momentum with error feedback, and returns the gradient that makes an optimizer's own momentum follow what was sent.

    p_i = beta m + g_i + e_i;  e_i <- p_i - C(p_i);  m' = mean_i C(p_i), the same on all ranks;  result m' - beta m;  m <- m'.
    An optimizer whose momentum is beta then holds m' itself (SGD), or (1 - beta) m' (Adam). A momentum changes less from step to step than
    a gradient, and its noise is averaged out, which suits signs. While nothing is compressed, the result is the mean gradient.
    State: `residual` (e_i), this rank's own, and `sent_momentum` (m), equal on all ranks; float[d], zero at first, in units of the
    gradient. Not for votes. The results are a good gradient for the optimizer's momentum only, not for squares of it: an Adam must have
    stopped to adapt its variance when compression begins, as OneBitAdam does. With reduce_scatter the mean is compressed again, as in the
    paper.
    Source: Tang et al. 2021 (1-bit Adam).
    """

    feeds_back: ClassVar[bool] = True
    shared_state: ClassVar[tuple[str, ...]] = ("sent_momentum",)
    momentum: float = momentum_knob()

    @property
    def optimizer_momentum(self) -> float:  # type: ignore[override]
        return self.momentum

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size), "sent_momentum": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return state["residual"] + (state["sent_momentum"] * self.momentum + grad)

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)}

    def on_aggregate(self, ops, total, spec, info, state):
        ranks = info.size / info.divisor  # a sum is that many times the mean
        mean = total / ranks
        return (mean - state["sent_momentum"] * self.momentum) * ranks, {"sent_momentum": ops.cast(mean, "float32")}
