from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ParameterError
from ..parts.field import FLOAT32_MAX, Field
from ..parts.ops import Array, Feedback, Ops
from ..parts.part import knob
from . import register
from .base import Compressor
from .fast_path import Fused
from .forms.scales import blocks, floats_from_bytes, floats_to_bytes

#: The largest norm that is sent, so that (norm / s) * s does not overflow.
LARGEST_NORM = FLOAT32_MAX * 0.99999


class _NormQuantizer(Compressor):
    """The base of qsgd and its adaptive forms: rounds at random to s levels of the block's 2-norm. A subclass chooses s."""

    unbiased: ClassVar[bool] = True
    bucket: int

    def variance(self, s: int, d: int) -> float:
        """Returns omega of s levels for d elements."""
        block = min(self.bucket, d)
        return min(block / s**2, block**0.5 / s)

    def norms_field(self, spec) -> Field:
        return Field("norms", "float32", blocks(spec.size, self.bucket)[1])

    def _scales(self, ops: Ops, norms: Array, s: int) -> tuple[Array, Array]:
        """Returns (float32 norms, zero if they are too small to divide by; s / norm, or 0 if the norm is zero)."""
        norms = ops.cast(ops.where(norms > LARGEST_NORM, LARGEST_NORM, norms), "float32")
        norms = ops.where(norms < float(smallest_norm(s)), 0.0, norms)
        return norms, ops.where(norms > 0, ops.number(s) / ops.where(norms > 0, norms, 1.0), 0.0)

    def quantize(self, ops, x, s: int, spec, info):
        """Returns the wire forms of the norms and of the codes."""
        if done := self.quantize_compiled(ops, x, Feedback(None), s, spec, info):
            return done.payload
        norms, scales = self._scales(ops, ops.block_norms(x, self.bucket, 2), s)
        key = info.private_key(spec.name, "qsgd")
        codes = ops.round_randomly(x, ops.spread(scales, self.bucket, spec.size), s, key)
        codes = codes + ((x < 0) * (1 << (code_width(s) - 1)))
        return floats_to_bytes(ops, norms), ops.pack(codes, code_width(s))

    def quantize_compiled(self, ops, grad, feedback, s: int, spec, info) -> Fused | None:
        """Quantizes gradient and residual by a kernel, and keeps what was not sent. None without kernels, or if the sum is not finite."""
        if not ops.compiles(grad):
            return None
        norms, codes = np.empty(blocks(spec.size, self.bucket)[1], np.float32), np.empty(code_bytes(spec.size, s), np.uint8)
        key = map(np.uint32, info.private_key(spec.name, "qsgd"))
        sources = ops.sources(feedback, grad)
        limits = LARGEST_NORM, smallest_norm(s)
        if not ops.kernels.quantize(*sources, self.bucket, code_width(s), *limits, np.int32(s), *key, norms, codes):
            return None
        return Fused((floats_to_bytes(ops, norms), codes), sources.unsent)

    def add_levels(self, ops, total, norms, codes, s: int, spec, first: bool, divisor: int) -> bool:
        """Adds what `dequantize` returns to `total` by a kernel; see `add_compiled`."""
        units = floats_from_bytes(ops, norms, "norm") / np.float32(s)
        with np.errstate(over="ignore"):
            if not np.isfinite(units * np.float32(s)).all():
                return False
        return ops.kernels.add_levels(total, codes, units, self.bucket, code_width(s), np.int32(s), first, np.float32(divisor))

    def dequantize(self, ops, norms, codes, s: int, spec):
        """Returns the elements. Raises PayloadError."""
        norms = floats_from_bytes(ops, norms, "norm")
        width = code_width(s)
        codes = ops.unpack(codes, width, spec.size)
        levels = codes & ((1 << (width - 1)) - 1)
        ops.require((levels <= s).all(), f"has a level above {s}")
        signed = ops.cast(levels * (1 - 2 * (codes >> (width - 1))), "float32")
        return signed * ops.spread(norms / ops.number(s), self.bucket, spec.size)


def smallest_norm(s: int) -> np.float32:
    """Returns the norm below which s / norm overflows."""
    return np.float32(s / FLOAT32_MAX * 1.0001)


def code_width(s: int) -> int:
    """Returns the bits of one code: the level, and the sign above it."""
    return s.bit_length() + 1


def code_bytes(size: int, s: int) -> int:
    return (size * code_width(s) + 7) // 8


def bucket_knob():
    return knob(512, "elements that share a norm", low=1, high=2**24)


@register("qsgd")
@dataclass(frozen=True)
class QSGD(_NormQuantizer):
    """Rounds elements to s levels of their block's norm, at random and without bias.

    Per block of `bucket` elements, with n = ||x||_2 of the block:  C(x)_j = n sign(x_j) xi_j / s,  where xi_j is s |x_j| / n rounded
    down or up at random, so that its expected value is exact.  s = 2**(bits-1) - 1 (8 bits: 127, 4 bits: 7, 2 bits: 1), or `levels`.
    x: float[d] -> one code of b bits per element (sign and level) and 4 bytes per block: b d / 8 + 4 d / bucket bytes.
    Unbiased, omega = min(B / s^2, sqrt(B) / s) with B = bucket; needs no memory when s >= sqrt(B). A zero block decodes to zeros, and so
    does one whose norm is under s / 3.4e38. Fewer bits add variance; larger blocks send fewer norms and add variance.
    Draws are private to each rank, from (seed, parameter, step, rank). Source: Alistarh et al. 2017, sec. 3.
    """

    #: What `bits` stands for if neither bits nor levels is given.
    DEFAULT_BITS: ClassVar[int] = 8
    bits: int | None = knob(None, "bits per element, sign included; 8 if neither bits nor levels is given", low=2, high=16)
    levels: int | None = knob(None, "number of levels s, instead of bits", low=1, high=32767)
    bucket: int = bucket_knob()

    def __post_init__(self):
        super().__post_init__()
        if self.bits is not None and self.levels is not None:
            raise ParameterError(f"qsgd: give bits or levels, not both (bits={self.bits}, levels={self.levels})")

    @property
    def s(self) -> int:
        """The number of levels above zero."""
        return self.levels if self.levels is not None else 2 ** ((self.bits or self.DEFAULT_BITS) - 1) - 1

    def omega(self, d):
        return self.variance(self.s, d)

    def fields(self, spec):
        return self.norms_field(spec), Field("codes", "uint8", code_bytes(spec.size, self.s))

    def compress(self, ops, x, spec, info, state):
        return self.quantize(ops, x, self.s, spec, info), state

    def fused(self, ops, grad, feedback, spec, info, state):
        return self.quantize_compiled(ops, grad, feedback, self.s, spec, info)

    def add_compiled(self, ops, total, payload, spec, first, divisor):
        return self.add_levels(ops, total, *payload, self.s, spec, first, divisor)

    def decompress(self, ops, payload, spec, info):
        return self.dequantize(ops, *payload, self.s, spec)
