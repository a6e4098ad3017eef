"""Both memories contain the training's momentum: one adds it after aggregation, equal on all ranks, one before compression, per rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory
from .dgc import masked


def momentum_knob():
    return knob(0.9, "fraction of the momentum that is kept per step", low=0, high=0.9999, headline=True)


@register("gradient_compression")
@dataclass(frozen=True)
class GradientCompression(Memory):
    """Compresses gradients with error feedback, and adds a momentum of the aggregates, which is the same on all ranks.

    p = g + e;  e <- p - C(p);  D = mean_i C(p_i);  m <- beta m + D;  result D + m, to be applied without momentum.
    D + m is the paper's rule, and counts the newest aggregate twice: the steps are those of plain SGD times 1 + 1 / (1 - beta).
    nesterov=True: result D + beta m, which is what SGD(nesterov=True) of torch and Keras computes from D.
    State: `residual` (e), this rank's own, and `momentum` (m), equal on all ranks; float[d], zero at first.
    Training is the same as with 'residual' and an optimizer whose momentum follows the same rule; here the momentum is part of the
    algorithm that all frameworks share. Works with any compressor. Source: Vogels et al. 2019, algorithm 2; better for top-k than
    'update_compression' in Sahu et al. 2021.
    """

    feeds_back: ClassVar[bool] = True
    shared_state: ClassVar[tuple[str, ...]] = ("momentum",)
    is_momentum: ClassVar[bool] = True
    momentum: float = momentum_knob()
    nesterov: bool = knob(False, "result D + beta m instead of the paper's D + m")

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
    """Adds each rank's own momentum to its gradient before compression, and compresses these updates with error feedback.

    m_i <- beta m_i + g_i;  p_i = (g_i + m_i) + e_i;  e_i <- p_i - C(p_i);  result mean_i C(p_i), to be applied without momentum.
    nesterov=True: p_i = (g_i + beta m_i) + e_i, which SGD(nesterov=True) of torch and Keras would apply. (Heavy ball, p_i = m_i + e_i, is
    'dgc(masking=False)'.)  masking=True: m_i <- 0 where something was sent, so that momentum that was applied stops acting; it needs a
    compressor that picks positions.
    State: `residual` (e_i) and `own_momentum` (m_i), this rank's own; float[d], zero at first. The momentum does not know what was applied,
    so it is worse for top-k than 'gradient_compression' (Sahu et al. 2021). Works with any compressor but votes. Source: Lin et al. 2018
    (DGC), from whom masking is, too, as Sahu et al. 2021 list it in their algorithm 3.
    """

    feeds_back: ClassVar[bool] = True
    is_momentum: ClassVar[bool] = True
    momentum: float = momentum_knob()
    nesterov: bool = knob(False, "compress g + beta m instead of the paper's g + m")
    masking: bool = knob(False, "set the momentum to zero where something was sent")

    def check(self, compressor):
        self.needs_magnitudes(compressor)
        if self.masking:
            self.needs_positions(compressor)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size), "own_momentum": ops.zeros(spec.size)}

    def absorb(self, ops, grad, spec, info, state):
        return {"own_momentum": ops.cast(state["own_momentum"] * self.momentum + grad, "float32")}

    def before(self, ops, grad, spec, info, state):
        momentum = state["own_momentum"] * self.momentum if self.nesterov else state["own_momentum"]
        return state["residual"] + (grad + momentum)

    def after(self, ops, compensated, sent, spec, info, state):
        momentum = masked(ops, state["own_momentum"], sent) if self.masking else state["own_momentum"]
        return {"residual": self.unsent(ops, compensated, sent), "own_momentum": momentum}
