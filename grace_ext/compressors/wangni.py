from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import FLOAT32_MAX, Field
from . import register
from .base import Compressor
from .forms.positions import decode_indices, encode_indices, index_bytes
from .forms.scales import floats_from_bytes, floats_to_bytes
from .forms.sparse import count_field, expect_bytes, finite, get_count, index_field, index_knob, kept, put_count, ratio_knob

SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
PASSES = 50


@register("wangni")
@dataclass(frozen=True)
class Wangni(Compressor):
    """Sends each element with a probability proportional to its magnitude: unbiased, and with the smallest variance.

    p_j = min(1, |x_j| / t);  C(x)_j = x_j / p_j with probability p_j, else 0: magnitudes of at least t are sent exactly, the others as +-t.
    t is such that k = max(1, ceil(ratio * d)) elements are expected (at most k, if many are zero): t = ||x||_1 / k at first, then the sum
    of the magnitudes below t, divided by k minus the number of the others, until no more reach t (at most 50 times).
    x: float[d] -> t; the m exact values (float32) and their positions; the n sampled positions and a sign each. m + n varies around k.
    Wire: 4 m + n / 8 bytes, about log2(d/k) + 2 bits per position, and 24 bytes; 0.10 bits per element at ratio 0.01 if no element
    stands out, 0.4 if a few hold nearly all.
    Unbiased: E||C(x) - x||^2 <= (d / k) ||x||^2 - ||the elements below t||^2; needs no memory. Draws are private to each rank. A zero
    tensor sends nothing. A lower ratio sends less and adds variance.
    Source: Wangni, Wang, Liu, Zhang 2018 (greedy algorithm), which starts from p_j = min(1, k |x_j| / ||x||_1) in the same way.
    """

    unbiased: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    ratio: float = ratio_knob()
    index: str = index_knob()

    def omega(self, d):
        return d / kept(self.ratio, d)

    def fields(self, spec):
        d = spec.size
        return (
            Field("level", "float32", 1),
            count_field(),
            Field("values", "float32", d, variable=True),
            index_field(d, d, self.index, exactly=False),
            index_field(d, d, self.index, exactly=False),
            Field("signs", "uint8", (d + 7) // 8, variable=True),
        )

    def mean_nbytes(self, spec):
        k = kept(self.ratio, spec.size)
        return min(self.nbytes(spec), 24 + 4 * k + index_bytes(k, spec.size, self.index))  # if all of them are exact

    def _level(self, ops, magnitudes, budget: int) -> float:
        """Returns t."""
        level, rest, room = FLOAT32_MAX, magnitudes, budget
        for _ in range(PASSES):
            total = ops.total(rest)
            if not total or room <= 0:
                break
            level = float(np.float32(min(max(total / room, SMALLEST), FLOAT32_MAX)))
            below = rest[rest < level]
            if len(below) == len(rest):
                break
            rest, room = below, room - (len(rest) - len(below))
        return level

    def compress(self, ops, x, spec, info, state):
        magnitudes = abs(x)
        level = self._level(ops, magnitudes, kept(self.ratio, spec.size))
        exact = ops.positions(magnitudes >= level)
        chances = ops.cast(magnitudes, "float64") / ops.upload(np.array([level]))
        sampled = ops.positions((magnitudes < level) & ops.drawn(chances, info.private_key(spec.name, "wangni")))
        return (
            floats_to_bytes(ops, np.array([level])),
            put_count(ops, len(sampled)),
            ops.to_bytes(x[exact], "float32"),
            encode_indices(ops, exact, spec.size, self.index),
            encode_indices(ops, sampled, spec.size, self.index),
            ops.pack_signs(x[sampled]),
        ), state

    def _decode(self, ops, payload, spec):
        """Returns ((positions, values) of the exact elements, those of the sampled ones). Raises PayloadError."""
        level = float(floats_from_bytes(ops, payload[0], "level")[0])
        count = get_count(ops, payload[1], spec.size, spec.size)
        values = finite(ops, ops.from_bytes(payload[2], "float32"))
        exact = decode_indices(ops, payload[3], len(values), spec.size, self.index)
        sampled = decode_indices(ops, payload[4], count, spec.size, self.index)
        expect_bytes(payload[5], (count + 7) // 8, f"signs for {count} values")
        return (exact, values), (sampled, ops.unpack_signs(payload[5], count) * level)

    def positions(self, ops, payload, spec, info):
        (exact, _), (sampled, _) = self._decode(ops, payload, spec)
        return ops.sort(ops.concat([exact, sampled]))

    def decompress(self, ops, payload, spec, info):
        dense = ops.zeros(spec.size)
        self.accumulate(ops, dense, payload, spec, info)
        return dense

    def accumulate(self, ops, total, payload, spec, info):
        for positions, values in self._decode(ops, payload, spec):
            total[positions] += values
