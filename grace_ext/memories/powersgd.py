from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register
from .base import Memory


@register("powersgd")
@dataclass(frozen=True)
class PowerSGDMemory(Memory):
    """Error feedback for matrices only: 'residual' for tensors of two dimensions or more, nothing for the others.

    p = e + g;  e <- p - C(p)  where there are two dimensions or more; p = g otherwise, and what is lost there is lost.
    State: `residual`, float[d], zero at first, of tensors of two dimensions or more. Saves the memory of vectors, which powersgd,
    powersgd_plus and lqsgd send dense, so that with them it equals 'residual'. With a compressor that does compress vectors use 'residual'.
    Source: Vogels, Karimireddy, Jaggi 2019. GRACE's also draws Q anew, at every step and from each rank's own generator; Q is the
    compressor's here.
    """

    feeds_back: ClassVar[bool] = True

    def init(self, ops, spec, info):
        return {"residual": ops.zeros(spec.size)} if len(spec.shape) > 1 else {}

    def before(self, ops, grad, spec, info, state):
        return state["residual"] + grad if len(spec.shape) > 1 else grad

    def after(self, ops, compensated, sent, spec, info, state):
        return {"residual": self.unsent(ops, compensated, sent)} if len(spec.shape) > 1 else {}
