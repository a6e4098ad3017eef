from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..parts.field import Field
from ..parts.ops import Feedback
from ..parts.part import knob
from . import register
from .base import Compressor
from .fast_path import Fused

# The 8-bit form keeps the 127 biased exponents above this one: magnitudes 2**-108 to 2**18.
LOWEST = 18


@register("natural")
@dataclass(frozen=True)
class Natural(Compressor):
    """Rounds each element to one of the two powers of two around it, at random and without bias (natural compression).

    |x| = 2^f (1 + m / 2^23) becomes 2^(f+1) with probability m / 2^23, else 2^f: exact in integers, m > u with u uniform in [0, 2^23).
    x: float[d] -> the exponent, 8 bits, and the sign: 9 bits per element.  Unbiased, omega = 1/8: needs no memory.
    Zero stays zero; a subnormal becomes 0 or 2^-126, without bias but beyond omega; magnitudes above 2^127 become 2^127.
    bits=8 keeps 7 bits of exponent, the magnitudes 2^-108 to 2^18. What rounds to less becomes 0 and what rounds to more becomes 2^18, so
    it is unbiased only inside that window, and not declared unbiased.
    Draws are private to each rank. Source: Horvath et al. 2022. GRACE's draw leaves out one value (a bias of 2^-23); GRACE has only the
    8-bit form, and turns NaN and Inf into numbers.
    """

    bits: int = knob(9, "9: every exponent; 8: magnitudes 2^-108 to 2^18", choices=(9, 8))

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.bits == 9

    def omega(self, d):
        return 1 / 8 if self.unbiased else None

    def fields(self, spec):
        if self.bits == 8:
            return (Field("codes", "uint8", spec.size),)
        return Field("exponents", "uint8", spec.size), Field("signs", "uint8", (spec.size + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        if done := self.fused(ops, x, Feedback(None), spec, info, state):
            return done.payload, state
        bits = ops.float_bits(x)
        draws = ops.random_words(info.private_key(spec.name, "natural"), spec.size) >> 9
        exponents = ((bits >> 23) & 255) + ops.as_int((bits & (2**23 - 1)) > draws)
        if self.bits == 9:
            return (ops.pack(ops.where(exponents > 254, 254, exponents), 8), ops.pack_signs(x)), state
        codes = exponents - LOWEST
        codes = ops.where(codes < 0, 0, ops.where(codes > 127, 127, codes))
        return (ops.pack(codes + 128 * ops.as_int(x < 0), 8),), state

    def fused(self, ops, grad, feedback, spec, info, state):
        if not ops.compiles(grad):
            return None
        sources, apart = ops.sources(feedback, grad), self.bits == 9
        codes, signs = np.empty(spec.size, np.uint8), np.empty((spec.size + 7) // 8, np.uint8)
        k0, k1 = info.private_key(spec.name, "natural")
        for piece, x, left in ops.pieces(sources):
            if apart:
                signs[piece.start // 8 : (piece.stop + 7) // 8] = ops.pack_signs(x)
            words = np.uint32((k0 + piece.start) % 2**32), np.uint32(k1)
            if not ops.kernels.encode_powers(x, left, np.int32(0 if apart else LOWEST), apart, *words, codes[piece]):
                return None
        return Fused((codes, signs) if apart else (codes,), sources.unsent)

    def add_compiled(self, ops, total, payload, spec, first, divisor):
        if self.bits == 9:
            return ops.kernels.add_powers(total, *payload, first, np.float32(divisor))
        book = self._powers(ops, np.arange(256))
        ops.kernels.add_book(total, payload[0], np.ones(1, np.float32), book, spec.size, first, np.float32(divisor))
        return True

    def _powers(self, ops, codes):
        """Returns the values of 8-bit codes."""
        kept = codes & 127
        return ops.bits_float((ops.where(kept > 0, kept + LOWEST, 0) << 23) | ((codes >> 7) << 31))

    def decompress(self, ops, payload, spec, info):
        codes = ops.unpack(payload[0], 8, spec.size)
        if self.bits == 9:
            ops.require((codes <= 254).all(), "has an exponent of Inf or NaN")
            return ops.bits_float(codes << 23) * ops.unpack_signs(payload[1], spec.size)
        return self._powers(ops, codes)
