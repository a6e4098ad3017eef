from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..coding import decode_indices, encode_indices, index_bytes
from . import register
from .base import Compressor, Field
from .sparse import VALUES, kept, ratio_knob, scatter, values_knob


@register("topk")
@dataclass(frozen=True)
class TopK(Compressor):
    """Sends the k elements of largest magnitude of each tensor.

    C(x)_j = x_j for j in the k largest |x_j|, else 0;  k = max(1, ceil(ratio * d)); ties go to the lowest position.
    x: float[d] -> values float32[k] (or 16 bits), positions coded (Elias-Fano).  Contraction delta = k/d, biased: pair with 'residual'.
    Wire: 4k bytes of values and about k (log2(d/k) + 2) / 8 of positions; 5.07 bytes a kept element at 1%. Fixed size.
    Source: Aji and Heafield 2017; Stich et al. 2018. Where GRACE sends 12 bytes a kept element, this sends 5.
    """

    wants_memory: ClassVar[bool] = True
    ratio: float = ratio_knob()
    values: str = values_knob()

    def fields(self, spec):
        k = kept(self.ratio, spec.size)
        return Field("values", VALUES[self.values], k), Field("positions", "uint8", index_bytes(k, spec.size))

    def compress(self, ops, x, spec, info, state):
        positions = ops.top_k(x, kept(self.ratio, spec.size))
        return (ops.to_bytes(x[positions], VALUES[self.values]), encode_indices(ops, positions, spec.size)), state

    def _decode(self, ops, payload, spec):
        positions = decode_indices(ops, payload[1], kept(self.ratio, spec.size), spec.size)
        return positions, ops.from_bytes(payload[0], VALUES[self.values])

    def decompress(self, ops, payload, spec, info):
        return scatter(ops, *self._decode(ops, payload, spec), spec.size)

    def accumulate(self, ops, total, payload, spec, info):
        positions, values = self._decode(ops, payload, spec)
        total[positions] += values
