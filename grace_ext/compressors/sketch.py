from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Compressor
from .forms.scales import floats_from_bytes, floats_to_bytes


@register("sketch")
@dataclass(frozen=True)
class Sketch(Compressor):
    """Divides the elements by value into groups of equal size, and sends each element's group and the groups' means.

    With q = `quantiles`, edges e_i = the element at index ceil(i d / q) of the sorted x, i = 1 .. q-1:  code c_j = number of edges <= x_j;
    C(x)_j = mean of the x with code c_j. Equal edges merge; the mean of an empty group is 0.
    x: float[d] -> ceil(log2 q) bits per element and q float32 means (6 bits and 256 bytes by default).
    The conditional means make it a projection: the error is orthogonal to what is sent, and its norm never exceeds that of x.
    Deterministic and biased, with the least relative error where elements are dense: pair with 'residual'. A zero tensor decodes to zeros.
    More quantiles give a smaller error and cost more bits; the outermost groups, which hold the largest elements, are the coarsest.
    Costs a sort. Source: Jiang et al. 2018 (SketchML), its quantizer, with exact quantiles and means.
    """

    wants_memory: ClassVar[bool] = True
    quantiles: int = knob(64, "number of groups", low=2, high=65536, headline=True)

    @property
    def width(self) -> int:
        """The bits of one code."""
        return (self.quantiles - 1).bit_length()

    def fields(self, spec):
        return Field("means", "float32", self.quantiles), Field("codes", "uint8", (spec.size * self.width + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        d, q = spec.size, self.quantiles
        ranks = np.minimum((np.arange(1, q) * d + q - 1) // q, d - 1)
        codes = ops.search(ops.host(ops.sort(x)[ops.upload(ranks)]), x)
        sums, counts = ops.sums_by_code(codes, x, q)
        return (floats_to_bytes(ops, sums / np.maximum(counts, 1)), ops.pack(codes, self.width)), state

    def decompress(self, ops, payload, spec, info):
        means = floats_from_bytes(ops, payload[0], "mean", signed=True)
        codes = ops.unpack(payload[1], self.width, spec.size)
        if int(codes.max()) >= self.quantiles:
            raise PayloadError(f"has a code above {self.quantiles - 1}")
        return means[codes]
