from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import Field
from . import register
from .base import Compressor
from .fast_path import Fused
from .forms.merged import MergedCasts


class _Half(Compressor):
    """The base of fp16 and bf16: a cast to 16 bits, which sums in float32."""

    wire: ClassVar[str]
    summable: ClassVar[bool] = True

    def fields(self, spec):
        return (Field("values", self.wire, spec.size),)

    def compress(self, ops, x, spec, info, state):
        return (ops.to_bytes(x, self.wire),), state

    def decompress(self, ops, payload, spec, info):
        return ops.from_bytes(payload[0], self.wire)

    def decompress_into(self, ops, payload, spec, info, out):
        if out is None or not ops.kernels or not ops.kernels.narrow:
            return self.decompress(ops, payload, spec, info)
        ops.kernels.widen(out, ops.halves(payload[0]), self._brains)
        return out

    @property
    def _brains(self) -> bool:
        return self.wire == "bfloat16"

    def fused(self, ops, grad, feedback, spec, info, state):
        if not ops.compiles(grad) or not ops.kernels.narrow:
            return None
        out = np.empty(spec.size, np.uint16)
        if feedback.residual is None:
            left, finite = None, ops.kernels.narrow(grad, self._brains, out)
        else:
            residual, grad, beta, gamma, _, left = ops.sources(feedback, grad)
            finite = ops.kernels.narrow_sum(residual, grad, beta, gamma, self._brains, out, left)
        return Fused((out.view(np.uint8),), left) if finite else None

    def merged(self, specs):
        return MergedCasts(self, specs)

    def batched(self, specs):
        return MergedCasts(self, specs)

    def add_compiled(self, ops, total, payload, spec, first, divisor):
        if not ops.kernels.narrow:
            return False
        return ops.kernels.add_halves(total, ops.halves(payload[0]), self._brains, first, np.float32(divisor))


@register("fp16")
@dataclass(frozen=True)
class FP16(_Half):
    """Casts to IEEE half precision.

    C(x) = half(clamp(x, -65504, 65504)), rounded to nearest even.  x: float[d] -> 2d bytes
    Relative error at most 2**-11 between 6.1e-5 and 65504; smaller values lose bits and vanish below 3e-8.
    Summable: the ranks' halves are added in float32, divided, and rounded to half once, so a sum cannot overflow the range
    (Horovod and DDP add in half precision). A 'residual' memory keeps the rounding error of a rank's own gradient, but not that of the
    mean; it is rarely needed.
    Gradients that already have 16 bits are sent as they are. Source: IEEE 754; Micikevicius et al. 2018.
    """

    wire: ClassVar[str] = "float16"


@register("bf16")
@dataclass(frozen=True)
class BF16(_Half):
    """Casts to bfloat16: the range of float32, 8 bits of precision.

    C(x) = bfloat16(x), rounded to nearest even.  x: float[d] -> 2d bytes
    Relative error at most 2**-8. Summable, like fp16. A 'residual' memory keeps the rounding error of a rank's own gradient, which is
    larger than fp16's, but not that of the mean.
    Gradients that already have 16 bits are sent as they are. Source: Kalamkar et al. 2019.
    """

    wire: ClassVar[str] = "bfloat16"
