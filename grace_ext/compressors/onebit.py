from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import Field
from ..parts.part import knob
from . import register
from .forms.scales import blocks, counts, floats_from_bytes, floats_to_bytes
from .forms.two_sided import TwoSided


@register("onebit")
@dataclass(frozen=True)
class OneBit(TwoSided):
    """Sends signs and two values per block: the mean of the negative elements and the mean of the others (1-bit SGD).

    C(x)_j = m- if x_j < 0, else m+, per block of `block` elements (default: the whole tensor); zeros are among the others, and the mean
    of no elements is 0.  x: float[d] -> ceil(d / 8) bytes of signs, and m- and m+ as float32, 8 bytes per block.
    Conditional means are the best two values for these signs, so the error is orthogonal to what is sent: never larger than that of
    'efsignsgd', and much smaller if the two sides differ. Contraction delta >= 1 / block; biased: pair with 'residual'.
    A zero block decodes to zeros, which keeps unused rows of an embedding as they are (see 'efsignsgd'). Smaller blocks follow the gradient
    more closely and cost 8 bytes each.
    Source: Seide et al. 2014, who use one block per column and quantize the aggregate again (as communicator 'reduce_scatter' does).
    GRACE sends a byte per sign, and in one version negates the mask bitwise: (-1, -3, 2, 4) decodes to (760, 760, 765, 765).
    """

    wants_memory: ClassVar[bool] = True
    number_of_sums: ClassVar[int] = 3
    block: int | None = knob(None, "elements that share two means; None: the whole tensor", low=1)

    def delta(self, d):
        return 1 / min(d, self.block or d)

    def fields(self, spec):
        number = blocks(spec.size, self.block)[1]
        return (
            Field("means below", "float32", number),
            Field("means above", "float32", number),
            Field("signs", "uint8", (spec.size + 7) // 8),
        )

    def compress(self, ops, x, spec, info, state):
        block, _ = blocks(spec.size, self.block)
        below = x < 0
        sums = [ops.block_norms(ops.where(mask, x, 0.0), block, 1) for mask in (below, ~below)]
        ones = ops.block_norms(ops.cast(ops.as_int(below), "float32"), block, 1)
        others = ops.upload(counts(spec.size, self.block).astype(np.float64)) - ones
        means = [total / ops.where(count < 1, 1.0, count) for total, count in zip(sums, (ones, others), strict=True)]
        return (floats_to_bytes(ops, 0.0 - means[0]), floats_to_bytes(ops, means[1]), ops.pack_signs(x)), state

    def sides(self, ops, floats):
        below, above = (floats_from_bytes(ops, piece, "mean", signed=True) for piece in floats)
        return below, above

    def floats(self, ops, sums, d):
        below, above, number = sums
        fewer, others = (ops.where(count < 1, 1.0, count) for count in (number, d - number))
        return floats_to_bytes(ops, 0.0 - below / fewer), floats_to_bytes(ops, above / others)
