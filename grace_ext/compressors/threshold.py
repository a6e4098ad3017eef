from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..coding import decode_indices, encode_indices, index_bytes, max_index_bytes
from ..parts import ITEMSIZE, knob
from . import register
from .base import Compressor, Field
from .sparse import VALUES, scatter, values_knob


@register("threshold")
@dataclass(frozen=True)
class Threshold(Compressor):
    """Sends every element whose magnitude reaches a fixed threshold, however many there are (hard threshold).

    C(x)_j = x_j where |x_j| >= threshold, else 0.  x: float[d] -> values float32[m] (or 16 bits) and their positions, 0 <= m <= d.
    An absolute compressor: ||x - C(x)||^2 <= threshold^2 d for every x. Biased: pair with 'residual'.
    Wire: as topk with k = m, and 8 bytes of counts. Where that would not be smaller than all values without positions, all are sent.
    The threshold is in units of the gradient (plus residual). Too low sends nearly everything, too high sends nothing for many
    steps; a rule that works is 1 / (2 sqrt(k)), k = elements a step that Top-k would send over the whole model.
    Source: Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization); Strom 2015.
    """

    wants_memory: ClassVar[bool] = True
    threshold: float = knob(0.01, "smallest magnitude that is sent, in units of the gradient", low=0, headline=True)
    values: str = values_knob()

    def fields(self, spec):
        return (
            Field("values", VALUES[self.values], spec.size, variable=True),
            Field("positions", "uint8", max_index_bytes(spec.size), variable=True),
        )

    def nbytes(self, spec):
        return ITEMSIZE[VALUES[self.values]] * spec.size + 8

    def sends_dense(self, spec):
        return False  # how much it sends is known from the values only; see compress

    def compress(self, ops, x, spec, info, state):
        d, item = spec.size, ITEMSIZE[VALUES[self.values]]
        positions = ops.at_least(x, self.threshold)
        if item * len(positions) + index_bytes(len(positions), d) >= item * d:
            positions = ops.arange(d)
        return (ops.to_bytes(x[positions], VALUES[self.values]), encode_indices(ops, positions, d)), state

    def _decode(self, ops, payload, spec):
        values = ops.from_bytes(payload[0], VALUES[self.values])
        return decode_indices(ops, payload[1], len(values), spec.size), values

    def decompress(self, ops, payload, spec, info):
        return scatter(ops, *self._decode(ops, payload, spec), spec.size)

    def accumulate(self, ops, total, payload, spec, info):
        positions, values = self._decode(ops, payload, spec)
        total[positions] += values
