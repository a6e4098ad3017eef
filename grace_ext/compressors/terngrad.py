from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..parts.field import Field
from ..parts.ops import Feedback
from ..parts.part import knob
from . import register
from .base import Compressor, sent_by
from .fast_path import Fused
from .forms.scales import floats_from_bytes, floats_to_bytes

#: The five trits of each byte below 3**5, as elements in {-1, 0, 1}, lowest first.
TRITS = (np.arange(243)[:, None] // 3 ** np.arange(5) % 3 - 1).astype(np.float32)


@register("terngrad")
@dataclass(frozen=True)
class TernGrad(Compressor):
    """Rounds each element to -s, 0 or +s at random, without bias; s is the largest magnitude.

    C(x)_j = s sign(x_j) b_j, where b_j is 1 with probability |x_j| / s, else 0; s = max_j |x_j|.
    x: float[d] -> ceil(d / 5) bytes, five elements in each (3^5 = 243), and 4 bytes of s: 1.6 bits per element.
    Unbiased, E||C(x)||^2 = ||x||_1 ||x||_inf, omega = (sqrt(d) - 1) / 2. A zero tensor decodes to zeros. Needs no memory, but one large
    element makes all the rest noisy: `clip` = c first limits magnitudes to c times the root mean square (2.5 in the paper), which is
    biased if it acts and greatly lowers the variance; too low a c cuts off most of the gradient, a high one does nothing.
    Draws are private to each rank, and have exactly the chance |x_j| / s, rounded to float32.
    Source: Wen et al. 2017, who clip at c standard deviations; the root mean square does not cut off a tensor of equal elements.
    GRACE sends a byte per element.
    """

    clip: float = knob(0.0, "limit magnitudes to this many times the root mean square; 0: no limit", low=0, high=1e6)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return not self.clip

    def omega(self, d):
        return None if self.clip else (d**0.5 - 1) / 2

    def fields(self, spec):
        return Field("scale", "float32", 1), Field("trits", "uint8", -(-spec.size // 5))

    def _scale(self, ops, x, largest: float, spec) -> float:
        if not self.clip:
            return largest
        limit = self.clip * ops.block_norms(x, spec.size, 2)[0] / spec.size**0.5
        return float(np.float32(limit)) if limit < largest else largest

    def compress(self, ops, x, spec, info, state):
        if done := self.fused(ops, x, Feedback(None), spec, info, state):
            return done.payload, state
        scale, magnitudes = ops.cast(ops.block_norms(x, spec.size, np.inf), "float32"), abs(x)
        if self.clip:
            limit = ops.cast(ops.block_norms(x, spec.size, 2) * self.clip / spec.size**0.5, "float32")
            scale = ops.where(limit < scale, limit, scale)
            magnitudes = ops.where(magnitudes > scale, scale, magnitudes)
        chances = magnitudes / ops.where(scale > 0, scale, 1.0)
        kept = ops.as_int(ops.drawn(chances, info.private_key(spec.name, "terngrad")))
        padding = ops.arange(-spec.size % 5) * 0
        codes = ops.concat([1 + kept * (1 - 2 * ops.as_int(x < 0)), padding])
        packed = sum(codes[i::5] * 3**i for i in range(5))
        return (floats_to_bytes(ops, scale), ops.pack(packed, 8)), state

    def fused(self, ops, grad, feedback, spec, info, state):
        if not ops.compiles(grad):
            return None
        sources = ops.sources(feedback, grad)
        if (largest := ops.measured(sources)) is None:
            return None
        scale = self._scale(ops, sources.x, largest, spec)
        trits = np.empty(-(-spec.size // 5), np.uint8)
        key = map(np.uint32, info.private_key(spec.name, "terngrad"))
        ops.kernels.encode_trits(sources.x, sources.left, np.float32(scale), *key, trits)
        return Fused((floats_to_bytes(ops, np.array([scale])), trits), sources.unsent)

    def combine(self, ops, payloads, spec, info, out=None):
        if not ops.kernels:
            return super().combine(ops, payloads, spec, info, out)
        values = np.zeros((len(payloads), 256, 8), np.float32)
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                values[rank, : len(TRITS), :5] = TRITS * floats_from_bytes(ops, payload[0], "scale")
        total, trits = ops.empty(spec.size) if out is None else out, ops.concat([payload[1] for payload in payloads])
        if ops.kernels.add_trits(total, trits, values.reshape(-1), len(payloads), np.float32(info.divisor)):
            return total
        return super().combine(ops, payloads, spec, info, out)  # raises the error that names the rank

    def decompress(self, ops, payload, spec, info):
        scale = floats_from_bytes(ops, payload[0], "scale")
        packed = ops.unpack(payload[1], 8, len(payload[1]))
        ops.require((packed < len(TRITS)).all(), f"has a byte above {len(TRITS) - 1}, the largest of five trits")
        return ops.upload(TRITS)[ops.within(packed, len(TRITS))].reshape(-1)[: spec.size] * scale
