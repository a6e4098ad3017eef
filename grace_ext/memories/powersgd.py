from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register
from .base import Memory


@register("powersgd")
@dataclass(frozen=True)
class PowerSGDMemory(Memory):
    """Keeps a residual for tensors of two dimensions or more only (error feedback for matrices).

    p = e + g;  e <- p - C(p)  for two dimensions or more; otherwise p = g, and what compression loses is lost.
    State: `residual`, float[d], zero at first, for tensors of two dimensions or more. It stores nothing for vectors, which powersgd,
    powersgd_plus and lqsgd send dense, so with these it equals 'residual'. With a compressor that does compress vectors, use 'residual'.
    Source: Vogels, Karimireddy, Jaggi 2019. GRACE's memory also draws Q anew at every step from each rank's own generator; here Q belongs
    to the compressor.
    """

    feeds_back: ClassVar[bool] = True

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)} if len(spec.shape) > 1 else {}

    def before(self, ops, grad, spec, info, state):
        return state["residual"] + grad if len(spec.shape) > 1 else grad

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)} if len(spec.shape) > 1 else {}
