from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PayloadError
from ..parts import knob
from . import register
from .base import Compressor, Field
from .scales import floats_from_bytes, floats_to_bytes

#: The five trits of each byte below 3**5, as elements in {-1, 0, 1}, lowest first.
TRITS = (np.arange(243)[:, None] // 3 ** np.arange(5) % 3 - 1).astype(np.float32)


@register("terngrad")
@dataclass(frozen=True)
class TernGrad(Compressor):
    """Rounds each element to -s, 0 or +s at random, without bias; s is the largest magnitude.

    C(x)_j = s sign(x_j) b_j, where b_j is 1 with probability |x_j| / s, s = max_j |x_j|.
    x: float[d] -> ceil(d / 5) bytes, five elements in each (3^5 = 243), and 4 bytes of s: 1.6 bits an element.
    Unbiased, E||C(x)||^2 = ||x||_1 ||x||_inf, omega = (sqrt(d) - 1) / 2. A zero tensor decodes to zeros. Needs no memory, but one large
    element makes all the rest noisy: `clip` = c first limits magnitudes to c times the root mean square (2.5 in the paper), which is
    biased where it acts and lowers the variance much; too low a c cuts off most of the gradient, a high one does nothing.
    Draws are private to the rank: the upper 24 bits of a word against 2**24 |x_j| / s.
    Source: Wen et al. 2017, who clip at c standard deviations; the root mean square does not cut off a tensor of equal elements.
    GRACE sends a byte an element.
    """

    clip: float = knob(0.0, "limit magnitudes to this many times the root mean square; 0: not at all", low=0, high=1e6)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return not self.clip

    def omega(self, d):
        return None if self.clip else (d**0.5 - 1) / 2

    def fields(self, spec):
        return Field("scale", "float32", 1), Field("trits", "uint8", -(-spec.size // 5))

    def compress(self, ops, x, spec, info, state):
        magnitudes = abs(x)
        scale = ops.largest(x)
        if self.clip:
            limit = self.clip * ops.block_norms(x, spec.size, 2)[0] / spec.size**0.5
            if limit < scale:
                scale = float(np.float32(limit))
                magnitudes = ops.where(magnitudes > scale, scale, magnitudes)
        chances = magnitudes / ops.spread(np.array([scale or 1.0]), spec.size, spec.size)
        draws = ops.random_words(info.private_key(spec.name, "terngrad"), spec.size) >> 8
        kept = ops.as_int(ops.cast(draws, "float32") < chances * 2.0**24)
        padding = ops.arange(-spec.size % 5) * 0
        codes = ops.concat([1 + kept * (1 - 2 * ops.as_int(x < 0)), padding])
        packed = sum(codes[i::5] * 3**i for i in range(5))
        return (floats_to_bytes(ops, np.array([scale])), ops.pack(packed, 8)), state

    def decompress(self, ops, payload, spec, info):
        scale = floats_from_bytes(ops, payload[0], "scale")
        packed = ops.unpack(payload[1], 8, len(payload[1]))
        if int(packed.max()) >= len(TRITS):
            raise PayloadError(f"has a byte of {int(packed.max())}, which is no five trits")
        return ops.upload(TRITS)[packed].reshape(-1)[: spec.size] * ops.spread(scale, spec.size, spec.size)
