"""The two places for a momentum: after aggregation, where all ranks have the same one, or before compression, where each has its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory
from .dgc import masked


def momentum_knob():
    return knob(0.9, "how much of the momentum is kept at every step", low=0, high=0.9999, headline=True)


@register("gradient_compression")
@dataclass(frozen=True)
class GradientCompression(Memory):
    """Error feedback, and a momentum of what was aggregated: the same momentum on all ranks.

    p = g + e;  e <- p - C(p);  D = mean_i C(p_i);  m <- beta m + D;  result D + m, to be applied without momentum.
    D + m is the rule of the paper, and weighs the newest aggregate twice: the steps are those of plain SGD times 1 + 1 / (1 - beta).
    nesterov=True: result D + beta m, which is what torch's and Keras's SGD(nesterov=True) make of D.
    State: `residual` (e), of this rank, and `momentum` (m), equal on all ranks; float[d], zero at first.
    For training this equals 'residual' with an optimizer that has the momentum, where that has the same rule; here it is part of the
    algorithm that all frameworks share. Any compressor. Source: Vogels et al. 2019, algorithm 2; the better of the two for top-k in
    Sahu et al. 2021.
    """

    feeds_back: ClassVar[bool] = True
    shared_state: ClassVar[tuple[str, ...]] = ("momentum",)
    is_momentum: ClassVar[bool] = True
    momentum: float = momentum_knob()
    nesterov: bool = knob(False, "result D + beta m, in place of the paper's D + m")

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size), "momentum": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return state["residual"] + grad

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)}

    def on_aggregate(self, ops, mean, spec, info, state):
        momentum = ops.cast(state["momentum"] * self.momentum + mean, "float32")
        return mean + (momentum * self.momentum if self.nesterov else momentum), {"momentum": momentum}


@register("update_compression")
@dataclass(frozen=True)
class UpdateCompression(Memory):
    """Error feedback of updates: every rank's own momentum is added to its gradient before compression.

    m_i <- beta m_i + g_i;  p_i = (g_i + m_i) + e_i;  e_i <- p_i - C(p_i);  result mean_i C(p_i), to be applied without momentum.
    nesterov=True: p_i = (g_i + beta m_i) + e_i, what torch's and Keras's SGD(nesterov=True) would apply. (Heavy ball, p_i = m_i + e_i, is
    'dgc(masking=False)'.)  masking=True: m_i <- 0 where something was sent, so that what was applied stops pushing; it needs a compressor
    that picks positions.
    State: `residual` (e_i) and `momentum` (m_i), of this rank; float[d], zero at first. The momentum does not know what was applied,
    which is worse for top-k than 'gradient_compression' (Sahu et al. 2021). Any compressor but votes. Source: Vogels et al. 2019,
    algorithm 3; masking from Lin et al. 2018.
    """

    feeds_back: ClassVar[bool] = True
    is_momentum: ClassVar[bool] = True
    momentum: float = momentum_knob()
    nesterov: bool = knob(False, "compress g + beta m, in place of the paper's g + m")
    masking: bool = knob(False, "forget the momentum of what was sent")

    def check(self, compressor):
        self.needs_magnitudes(compressor)
        if self.masking:
            self.needs_positions(compressor)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size), "momentum": ops.zeros(spec.size)}

    def absorb(self, ops, grad, spec, info, state):
        return {"momentum": ops.cast(state["momentum"] * self.momentum + grad, "float32")}

    def before(self, ops, grad, spec, info, state):
        momentum = state["momentum"] * self.momentum if self.nesterov else state["momentum"]
        return state["residual"] + (grad + momentum)

    def after(self, ops, compensated, sent, spec, info, state):
        momentum = masked(ops, state["momentum"], sent) if self.masking else state["momentum"]
        return {"residual": self.unsent(ops, compensated, sent), "momentum": momentum}
