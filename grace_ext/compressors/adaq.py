from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import Field
from . import register
from .forms.positions import decode_indices, encode_indices, index_bytes
from .forms.scales import floats_from_bytes, floats_to_bytes
from .forms.sparse import AtPositions, count_field, expect_bytes, get_count, index_field, index_knob, kept, put_count, ratio_knob


@register("adaq")
@dataclass(frozen=True)
class AdaQ(AtPositions):
    """Sends the positions of the largest positive and the largest negative elements, and one mean per sign.

    S+ = the ceil(ratio * n+) largest of the n+ positive elements, S- = the ceil(ratio * n-) largest magnitudes of the n- negative ones, at
    least one of each sign if there is one; ties go to the lowest positions.
        C(x)_j = mean of x over S+ for j in S+, mean of x over S- for j in S-, else 0.
    x: float[d] -> 2 means (float32, magnitudes), the number k of positions, the coded positions and k signs; k <= ceil(ratio d) + 1.
    Wire: k / 8 bytes of signs, about k (log2(d/k) + 2) / 8 of positions, and 20 bytes; 0.10 bits per element at ratio 0.01. The size
    varies with the number of zeros. A sign without elements has mean 0 and sends no positions.
    Biased, contraction delta >= 1 / d: pair with 'residual'. Too low a ratio converges slowly; too high a one replaces many different
    values by one mean.
    Source: Dryden et al. 2016 (adaptive quantization), which GRACE calls adaq; GRACE estimates the two thresholds on a sample of 1%,
    here the selection is exact.
    """

    wants_memory: ClassVar[bool] = True
    ratio: float = ratio_knob()
    index: str = index_knob()

    def _most(self, d):
        return min(d, kept(self.ratio, d) + 1)

    def delta(self, d):
        return 1 / d

    def fields(self, spec):
        d, most = spec.size, self._most(spec.size)
        return (
            Field("means", "float32", 2),
            count_field(),
            index_field(most, d, self.index, exactly=False),
            Field("signs", "uint8", (most + 7) // 8, variable=True),
        )

    def mean_nbytes(self, spec):
        k = kept(self.ratio, spec.size)
        return min(self.nbytes(spec), 20 + index_bytes(k, spec.size, self.index) + (k + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        sides, means = [], []
        for candidates in (ops.positions(x > 0), ops.positions(x < 0)):
            if len(candidates):
                candidates = candidates[ops.top_k(x[candidates], kept(self.ratio, len(candidates)))]
            sides.append(candidates)
            means.append(abs(ops.total(x[candidates])) / len(candidates) if len(candidates) else 0.0)
        positions = ops.sort(ops.concat(sides))
        return (
            floats_to_bytes(ops, np.array(means)),
            put_count(ops, len(positions)),
            encode_indices(ops, positions, spec.size, self.index),
            ops.pack_signs(x[positions]),
        ), state

    def decoded(self, ops, payload, spec, info):
        means = floats_from_bytes(ops, payload[0], "mean")
        count = get_count(ops, payload[1], self._most(spec.size), spec.size)
        positions = decode_indices(ops, payload[2], count, spec.size, self.index)
        expect_bytes(payload[3], (count + 7) // 8, f"signs for {count} values")
        signs = ops.unpack_signs(payload[3], count)
        return positions, ops.where(signs > 0, signs * float(means[0]), signs * float(means[1]))
