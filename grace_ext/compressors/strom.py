from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Observed, whole
from .forms.positions import decode_indices, encode_indices, index_bytes
from .forms.sparse import AtPositions, count_field, expect_bytes, get_count, index_field, index_knob, put_count

LEVEL_BITS = 16


@register("strom")
@dataclass(frozen=True)
class Strom(AtPositions):
    """Sends the sign of every element that reaches a fixed threshold; it decodes to the threshold with that sign.

    C(x)_j = sign(x_j) tau if |x_j| >= tau, else 0; with multi=True, sign(x_j) tau min(round(|x_j| / tau), 2^16) (ties to even).
    x: float[d] -> k positions and a code of 1 bit (the sign) each; with multi=True, the sign and the level - 1, in the bits that the
    largest level of the tensor needs, 17 at most. 0 <= k <= d.
    Wire: k / 8 bytes of signs, about k (log2(d/k) + 2) / 8 of positions, and 12 bytes (multi: 13 and the bits of the levels).
    Biased, and useless without 'residual', which keeps what was not sent and the rest of what was. Not an absolute compressor: one step
    takes at most tau (multi: 65536 tau) from an element, and the residual grows if gradients are larger than that for long.
    `threshold` is in units of the gradient: one that is too low sends nearly everything as signs of the same small step,
    one that is too high sends nothing for many steps. multi=True tolerates a low one.
    Source: Strom 2015, whose 32 bits per element are 31 of position and one of sign. That an element equal to tau is sent is this
    library's choice.
    """

    wants_memory: ClassVar[bool] = True
    threshold: float = knob(0.01, "smallest magnitude that is sent, and the value that it decodes to", low=1e-30, high=1e30, headline=True)
    multi: bool = knob(False, "send how many times the threshold an element is, not only its sign")
    index: str = index_knob()

    def fields(self, spec):
        d = spec.size
        width = (Field("width", "uint8", 1),) if self.multi else ()
        return (
            count_field(),
            *width,
            index_field(d, d, self.index, exactly=False),
            Field("codes", "uint8", (d * (LEVEL_BITS + 1 if self.multi else 1) + 7) // 8, variable=True),
        )

    def mean_nbytes(self, spec):
        k = -(-spec.size // 100)  # for a threshold that suits the gradient
        return min(self.nbytes(spec), 12 + self.multi + index_bytes(k, spec.size, self.index) + (k + 7) // 8)

    def sends_dense(self, spec):
        return False  # only the values decide how much is sent

    def compress(self, ops, x, spec, info, state):
        positions = ops.at_least(x, self.threshold)
        chosen, count = x[positions], len(positions)
        index = encode_indices(ops, positions, spec.size, self.index)
        if not self.multi:
            return (put_count(ops, count), index, ops.pack_signs(chosen)), state
        limit = 1 << LEVEL_BITS
        levels = ops.rint(ops.cast(abs(chosen), "float64") / float(np.float32(self.threshold)))
        levels = ops.as_int(ops.where(levels < limit, levels, float(limit))) - 1
        width = (int(levels.max()).bit_length() if count else 0) + 1
        codes = ops.pack(levels * 2 + ops.as_int(chosen >= 0), width) if count else index[:0]
        return (put_count(ops, count), ops.to_bytes(ops.arange(1) + width, "int8"), index, codes), state

    def observed(self, ops, payload, spec, info, state):
        """An element that is not sent is below the threshold, which says as much of it as the threshold does of one that is."""
        return Observed(self.decompress(ops, payload, spec, info), whole)

    def decoded(self, ops, payload, spec, info):
        count = get_count(ops, payload[0], spec.size, spec.size)
        positions = decode_indices(ops, payload[-2], count, spec.size, self.index)
        width = int(payload[1][0]) if self.multi else 1
        if not 1 <= width <= LEVEL_BITS + 1:
            raise PayloadError(f"has codes of {width} bits, expected 1 to {LEVEL_BITS + 1}")
        expect_bytes(payload[-1], (count * width + 7) // 8, f"codes for {count} values")
        if not self.multi:
            return positions, ops.unpack_signs(payload[-1], count) * self.threshold
        codes = ops.unpack(payload[-1], width, count)
        return positions, ops.cast(((codes >> 1) + 1) * ((codes & 1) * 2 - 1), "float32") * self.threshold
