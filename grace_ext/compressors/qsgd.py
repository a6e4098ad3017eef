from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ParameterError, PayloadError
from ..parts import knob
from . import register
from .base import Compressor, Field

LARGEST = float(np.finfo(np.float32).max)


@register("qsgd")
@dataclass(frozen=True)
class QSGD(Compressor):
    """Rounds to s levels of the block's norm, at random and without bias.

    Per block of `bucket` elements, with n = ||x||_2 of the block:  C(x)_j = n sign(x_j) xi_j / s,  where xi_j is s |x_j| / n rounded
    down or up at random so that its mean is exact.  s = 2**(bits-1) - 1 (8 bits: 127, 4 bits: 7, 2 bits: 1), or `levels`.
    x: float[d] -> one code of b bits an element (sign and level) and 4 bytes a block: b d / 8 + 4 d / bucket bytes.
    Unbiased, omega = min(B / s^2, sqrt(B) / s) with B = bucket; needs no memory when s >= sqrt(B). A zero block decodes to zeros, and so
    does one whose norm is under s / 3.4e38. Fewer bits: more variance; larger buckets: fewer scales, more variance.
    Draws are private to the rank, from (seed, parameter, step, rank). Source: Alistarh et al. 2017, sec. 3.
    """

    unbiased: ClassVar[bool] = True
    bits: int | None = knob(None, "bits an element, sign included; 8 if neither bits nor levels is given", low=2, high=8)
    levels: int | None = knob(None, "number of levels s, instead of bits", low=1, high=32767)
    bucket: int = knob(512, "elements that share a norm", low=1, high=2**24)

    def __post_init__(self):
        super().__post_init__()
        if self.bits is not None and self.levels is not None:
            raise ParameterError(f"qsgd: give bits or levels, not both (bits={self.bits}, levels={self.levels})")

    @property
    def s(self) -> int:
        """The number of levels above zero."""
        return self.levels if self.levels is not None else 2 ** ((self.bits or 8) - 1) - 1

    @property
    def width(self) -> int:
        """Bits of one code: the level, and the sign above it."""
        return self.s.bit_length() + 1

    def fields(self, spec):
        return (
            Field("norms", "float32", -(-spec.size // self.bucket)),
            Field("codes", "uint8", (spec.size * self.width + 7) // 8),
        )

    def _scales(self, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 norms with hopeless ones set to zero, s / norm where there is one, else 0)."""
        norms = np.minimum(norms, LARGEST * 0.99999).astype(np.float32)  # so that norm / s times s does not overflow
        norms[norms < self.s / LARGEST * 1.0001] = 0
        with np.errstate(divide="ignore"):
            return norms, np.where(norms > 0, np.float32(self.s) / norms, np.float32(0))

    def compress(self, ops, x, spec, info, state):
        norms, scales = self._scales(ops.block_norms(x, self.bucket, 2))
        key = info.private_key(spec.name, "qsgd")
        codes = ops.round_randomly(x, ops.spread(scales, self.bucket, spec.size), self.s, key)
        codes = codes + ((x < 0) * (1 << (self.width - 1)))
        return (ops.to_bytes(ops.upload(norms), "float32"), ops.pack(codes, self.width)), state

    def decompress(self, ops, payload, spec, info):
        norms = ops.host(ops.from_bytes(payload[0], "float32"))
        if not np.isfinite(norms).all() or (norms < 0).any():
            raise PayloadError("has a norm that is negative or not finite")
        codes = ops.unpack(payload[1], self.width, spec.size)
        levels = codes & ((1 << (self.width - 1)) - 1)
        if int(levels.max()) > self.s:
            raise PayloadError(f"has a level above {self.s}")
        signed = ops.cast(levels * (1 - 2 * (codes >> (self.width - 1))), "float32")
        return signed * ops.spread(norms / np.float32(self.s), self.bucket, spec.size)
