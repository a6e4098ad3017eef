from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import Field
from . import register
from .base import Compressor
from .fast_path import Fused
from .forms.merged import MergedCasts


@register("none")
@dataclass(frozen=True)
class NoCompression(Compressor):
    """Sends the gradient as it is.

    C(x) = x, rounded to the gradient's own dtype.  x: float[d]
    Wire: d elements of the gradient's dtype (4d bytes for float32, 2d for 16-bit gradients, 8d for float64).
    Unbiased, summable; equals the engine's dense averaging. 16-bit gradients are summed in float32 and rounded once.
    """

    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    keeps_float64: ClassVar[bool] = True

    def omega(self, d):
        return 0.0

    def delta(self, d):
        return 1.0

    def sends_dense(self, spec):
        return False  # it is the dense form

    def fields(self, spec):
        return (Field("values", spec.dtype, spec.size),)

    def compress(self, ops, x, spec, info, state):
        return (ops.to_bytes(x, spec.dtype),), state

    def decompress(self, ops, payload, spec, info):
        return ops.copy(ops.from_bytes(payload[0], spec.dtype))

    def decompress_into(self, ops, payload, spec, info, out):
        if out is None or spec.dtype == "float64":
            return self.decompress(ops, payload, spec, info)
        out[:] = ops.from_bytes(payload[0], spec.dtype)
        return out

    def fused(self, ops, grad, feedback, spec, info, state):
        if grad.dtype != np.float32 or (x := ops.compensate(feedback, grad)) is None:
            return None
        sent = ops.to_bytes(x, spec.dtype)
        if feedback.residual is None:
            return Fused((sent,), None)
        if spec.dtype == "float32":
            return Fused((sent,), ops.zeros(spec.size))
        # A float64 gradient whose memory works in float32 comes here, too.
        return Fused((sent,), ops.cast(x - ops.from_bytes(sent, spec.dtype), "float32"))

    def merged(self, specs):
        return MergedCasts(self, specs)

    def batched(self, specs):
        return MergedCasts(self, specs)
