from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from ..parts.part import knob
from . import register
from .base import Memory


class _Estimates(Memory):
    """Compresses what this rank has minus its estimate of it; all ranks know the mean of the estimates. The base of ef21 and ef21_sgdm."""

    resumes_alone: ClassVar[bool] = False
    mean_state: ClassVar[Mapping[str, str]] = MappingProxyType({"ef21_mean": "ef21_estimate"})

    def check(self, compressor):
        self.needs_contraction(compressor)
        self.needs_mean(compressor)

    def init(self, ops, spec, info):
        return {"ef21_estimate": ops.zeros(spec.size), "ef21_mean": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return grad - state["ef21_estimate"]

    def after(self, ops, compensated, sent, spec, info, state):
        return {"ef21_estimate": ops.cast(state["ef21_estimate"] + sent.values(), "float32")}

    def on_aggregate(self, ops, mean, spec, info, state):
        estimate = ops.cast(state["ef21_mean"] + mean, "float32")
        return ops.copy(estimate), {"ef21_mean": estimate}


@register("ef21")
@dataclass(frozen=True)
class EF21(_Estimates):
    """Compresses the difference between each rank's gradient and a running estimate of it, and applies the mean of the estimates.

    c_i = C(g_i - h_i);  h_i <- h_i + c_i;  G <- G + mean_i c_i, the same on all ranks;  result G.
    If the gradients converge, so do the estimates, and the error goes to zero: with exact gradients it converges at the rate of gradient
    descent, without a bound on the gradients or on how they differ between ranks. Mini-batch noise is not averaged out over time
    ('ef21_sgdm' does that), and the first steps are short because the estimates start at zero.
    State: `ef21_estimate` (h_i) and `ef21_mean` (G = mean_i h_i, up to rounding), float[d], zero at first. Works with any optimizer.
    Needs a contraction (topk, randomk, efsignsgd, pipelines of these); a threshold or a vote is not one.
    Source: Richtarik, Sokolov, Fatkhullin 2021.
    """


@register("ef21_sgdm")
@dataclass(frozen=True)
class EF21SGDM(_Estimates):
    """Compresses the difference between a running mean of each rank's gradients and its estimate (EF21 for noisy gradients).

    v_i <- m v_i + (1 - m) g_i;  c_i = C(v_i - h_i);  h_i <- h_i + c_i;  G <- G + mean_i c_i;  result G, to be applied without momentum.
    m (`momentum`): closer to 1 averages more noise out and reacts more slowly; with m = 0 it is ef21. v starts at zero, so the first
    1 / (1 - m) steps are shorter.
    State: `ef21_momentum` (v_i), `ef21_estimate` (h_i) and `ef21_mean` (G), float[d], zero at first. Needs a contraction, as ef21 does.
    Source: Fatkhullin, Tyurin, Richtarik 2023, where v starts at a first gradient.
    """

    is_momentum: ClassVar[bool] = True
    momentum: float = knob(0.9, "fraction of the running mean that is kept per step", low=0, high=0.9999, headline=True)

    def init(self, ops, spec, info):
        return {"ef21_momentum": ops.zeros(spec.size), **super().init(ops, spec, info)}

    def absorb(self, ops, grad, spec, info, state):
        return {"ef21_momentum": ops.cast(state["ef21_momentum"] * self.momentum + grad * (1 - self.momentum), "float32")}

    def before(self, ops, grad, spec, info, state):
        return state["ef21_momentum"] - state["ef21_estimate"]
