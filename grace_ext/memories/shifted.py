"""These memories subtract a shift from each rank's gradient before it is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from ..errors import IncompatiblePartsError
from ..parts.part import knob
from . import register
from .base import Memory


@register("diana")
@dataclass(frozen=True)
class Diana(Memory):
    """Learns a shift for each rank, and sends the unbiased compression of gradient minus shift: no error feedback, and no bias.

    c_i = Q(g_i - h_i);  result h + mean_i c_i;  h_i <- h_i + alpha c_i;  h <- h + alpha mean_i c_i.
    The shifts follow the gradients. If exact gradients converge, what is compressed goes to zero, and with it the variance of Q, even if
    the gradients differ between ranks.
    State: `diana_shift` (h_i) and `diana_mean` (h = mean_i h_i, up to rounding), float[d], zero at first. Works with any optimizer.
    alpha: how fast the shifts learn; None means 1 / (1 + omega), the largest safe value, omega being Q's variance for a tensor of this
    size. Lower is slower, higher may diverge. Needs an unbiased compressor (qsgd, natural, terngrad, randomk(scale=True)).
    Source: Mishchenko, Gorbunov, Takac, Richtarik 2019.
    """

    resumes_alone: ClassVar[bool] = False
    mean_state: ClassVar[Mapping[str, str]] = MappingProxyType({"diana_mean": "diana_shift"})
    alpha: float | None = knob(None, "how fast shifts learn; None: 1 / (1 + omega)", above=0, high=1, kind=float)

    def check(self, compressor):
        if not compressor.unbiased:
            raise IncompatiblePartsError(
                f"memory 'diana' needs an unbiased compressor, such as qsgd, natural, terngrad or randomk(scale=True), and {compressor} is "
                "biased; with it use memory 'residual' or 'ef21'"
            )
        if self.alpha is None and compressor.omega(64) is None:
            raise IncompatiblePartsError(
                f"memory 'diana' derives alpha from the variance omega, which {compressor} does not declare; give diana an alpha"
            )
        self.needs_mean(compressor)

    def _alpha(self, compressor, spec) -> float:
        # A tensor that was sent dense has no variance, so its alpha is 1 whatever the knob says.
        omega = compressor.omega(spec.size)
        return 1 / (1 + omega) if self.alpha is None or omega == 0 else self.alpha

    def init(self, ops, spec, info):
        return {"diana_shift": ops.zeros(spec.size), "diana_mean": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return grad - state["diana_shift"]

    def after(self, ops, compensated, sent, spec, info, state):
        alpha = self._alpha(sent.compressor, spec)
        return {
            "diana_shift": ops.cast(state["diana_shift"] + sent.values() * alpha, "float32"),
            "diana_mean": ops.cast(state["diana_mean"] + sent.aggregate * alpha, "float32"),
        }

    def exchange(self, ops, send, grad, spec, info, state):
        compensated = self.before(ops, grad, spec, info, state)
        done = yield from send(compensated)
        kept = self.after(ops, compensated, done, spec, info, state)
        return state["diana_mean"] + done.aggregate, done.state, kept


@register("ef_star")
@dataclass(frozen=True)
class EFStar(Memory):
    """Subtracts a given shift from the gradient before error feedback, for experiments on problems whose optimum is known.

    p = e + (g - h*);  e <- p - C(p);  result mean_i C(p_i). h*_i is the gradient of rank i's loss at the optimum. These sum to zero over
    the ranks, so nothing has to be added back. Only what is not yet optimal enters the residual: exact gradients converge linearly, while
    'residual' leaves an error in proportion to how the ranks' gradients differ.
    State: `residual` (e) and `shift` (h*), float[d], zero at first: with a zero shift it is 'residual'. The shift comes from an oracle: set
    it in the state, which exists after a first step (one on zero gradients changes nothing):
        saved = cluster.state_dict()
        for rank in range(n): saved["ranks"][rank]["state"]["shift/w"] = h_star[rank]      # float32, flat
        cluster.load_state_dict(saved)
    and likewise in Exchange.state_dict or the optimizer's 'grace_ext' entry. Works with any compressor that 'residual' takes, except votes.
    Source: Gorbunov, Kovalev, Makarenko, Richtarik 2020 (EC-GDstar).
    """

    feeds_back: ClassVar[bool] = True
    resumes_alone: ClassVar[bool] = False
    zero_sum_state: ClassVar[tuple[str, ...]] = ("shift",)

    def check(self, compressor):
        self.needs_magnitudes(compressor)

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size), "shift": ops.zeros(spec.size)}

    def before(self, ops, grad, spec, info, state):
        return state["residual"] + (grad - state["shift"])

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)}
