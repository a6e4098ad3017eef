from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import PayloadError
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Compressor

# The 2-bit tags, and the bytes that follow for each.
DROPPED, BYTE, HALF, RAW = range(4)
SIZES = (0, 1, 2, 4)


@register("inceptionn")
@dataclass(frozen=True)
class Inceptionn(Compressor):
    """Rounds each element to 0, 8, 16 or 32 bits, depending on its magnitude, so that no error exceeds 2^-(E+1).

    With E = `bound_exponent`, u = round(|x| 2^E) and v = round(|x| 2^15), to nearest:  u = 0: dropped;  u < 128: 8 bits, sign and u;
    otherwise, v < 2^15: 16 bits, sign and v;  otherwise raw float32.
    x: float[d] -> a tag of 2 bits per element, then the bytes of all 8-bit values, of the 16-bit ones and of the raw ones: in bits
    2 d + 8 n8 + 16 n16 + 32 n32, and 4 bytes of count; between 2 and 34 bits per element. Only the values decide how much is sent.
    An absolute compressor, kappa = 2^-(E+1) sqrt(d). Biased: pair with 'residual'. The bound is in units of the gradient: too low an E
    drops nearly everything, too high an E sends most values in 16 bits. Made for gradients below 1; larger ones are sent raw.
    Source: Li et al. 2018, with the same tags and bounds; magnitudes just under 1 are sent raw here, so that the bound holds for them,
    too. GRACE takes a decimal logarithm for the exponent, and loses the leading bit of 8-bit values up to 2^-7.
    """

    wants_memory: ClassVar[bool] = True
    bound_exponent: int = knob(10, "E: errors are at most 2^-(E+1)", low=7, high=15, headline=True)

    def kappa(self, d):
        return 2.0 ** -(self.bound_exponent + 1) * d**0.5

    def fields(self, spec):
        return Field("tags", "uint8", (2 * spec.size + 7) // 8), Field("values", "uint8", 4 * spec.size, variable=True)

    def sends_dense(self, spec):
        return False  # only the values decide how much is sent

    def compress(self, ops, x, spec, info, state):
        magnitudes = abs(x)
        magnitudes = ops.where(magnitudes > 2, 2.0, magnitudes)  # so that no product overflows; these are sent raw
        coarse, fine = (ops.as_int(ops.rint(magnitudes * 2.0**e)) for e in (self.bound_exponent, 15))
        tags = ops.as_int(coarse > 0) + ops.as_int(coarse > 127) + ops.as_int((coarse > 127) & (fine > 2**15 - 1))
        at = [ops.positions(tags == tag) for tag in (BYTE, HALF, RAW)]
        signs = ops.as_int(x < 0)
        pieces = [
            ops.pack(coarse[at[0]] + 128 * signs[at[0]], 8),
            ops.pack(fine[at[1]] + 2**15 * signs[at[1]], 16),
            ops.to_bytes(x[at[2]], "float32"),
        ]
        return (ops.pack(tags, 2), ops.concat(pieces)), state

    def decompress(self, ops, payload, spec, info):
        tags = ops.unpack(payload[0], 2, spec.size)
        at = [ops.positions(tags == tag) for tag in (BYTE, HALF, RAW)]
        ends = [0]
        for positions, size in zip(at, SIZES[1:], strict=True):
            ends.append(ends[-1] + len(positions) * size)
        if ends[-1] != len(payload[1]):
            raise PayloadError(f"has {len(payload[1])} bytes of values, but its tags stand for {ends[-1]}")
        out = ops.zeros(spec.size)
        for i, width, exponent in ((0, 8, self.bound_exponent), (1, 16, 15)):
            codes = ops.unpack(payload[1][ends[i] : ends[i + 1]], width, len(at[i]))
            low = 1 << (width - 1)
            out[at[i]] = ops.cast((codes & (low - 1)) * (1 - 2 * (codes // low)), "float32") * 2.0**-exponent
        raw = ops.from_bytes(payload[1][ends[2] :], "float32")
        if not ops.all_finite(raw):
            raise PayloadError("has a value that is not finite")
        out[at[2]] = raw
        return out
