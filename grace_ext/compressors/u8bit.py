from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..parts.field import Field
from ..parts.ops import Feedback
from ..parts.part import knob
from . import register
from .base import Compressor
from .fast_path import Fused
from .forms.scales import blocks, floats_from_bytes, floats_to_bytes


def _book() -> np.ndarray:
    """Returns float32[128], ascending: 0, and in decade 10^(i-6) the midpoints of 2^i equal parts of [0.1, 1], i = 0..6; the last is 1."""
    values = [0.0] + [(0.1 + 0.9 * (j + 0.5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for j in range(2**i)]
    return np.array([*values[:-1], 1.0], np.float64).astype(np.float32)


BOOK = _book()
#: The edges at which the nearest value of the book changes.
EDGES = ((BOOK[1:].astype(np.float64) + BOOK[:-1]) / 2).astype(np.float32)


def _table() -> tuple[np.uint32, np.ndarray]:
    """Returns (lowest, table: uint32[]), by which a kernel finds how many edges are <= a float in [0, 1]. With b = the float's bits -
    lowest, at least 0, that is (table[b >> 16] + b % 2^16) >> 16. Among floats of the same upper 16 bits there is at most one edge."""
    edges = EDGES.view(np.uint32).astype(np.int64)
    lowest = edges[0] >> 16 << 16
    starts = np.arange(lowest, np.float32(1).view(np.uint32) + 1, 2**16)
    below, through = (np.searchsorted(edges, ends, side="left") for ends in (starts, starts + 2**16))
    to_edge = np.where(through > below, edges[np.minimum(below, len(edges) - 1)] - starts, 2**16)
    return np.uint32(lowest), ((below << 16) + 2**16 - to_edge).astype(np.uint32)


#: The values of the codes; the sign is the highest bit.
SIGNED_BOOK = np.concatenate([BOOK, -BOOK])
LOWEST, TABLE = _table()


@register("u8bit")
@dataclass(frozen=True)
class U8Bit(Compressor):
    """Rounds to 8-bit dynamic-tree numbers: a sign, and the nearest of 128 magnitudes relative to the block's largest.

    C(x)_j = s sign(x_j) b_q, with s = max |x| of the block of `block` elements (default: the whole tensor) and b_q the value of the code
    book nearest to |x_j| / s; ties go up. The book has 0, and for i = 0..6 the midpoints of 2^i equal parts of [0.1, 1], times 10^(i-6);
    its largest is 1, so that the largest element is exact. Elements near s are rounded to 0.7% of s, small ones relatively more coarsely,
    and those under 2.75e-7 s become 0.
    x: float[d] -> one byte per element (sign and place in the book) and 4 bytes per block. A zero block decodes to zeros.
    Deterministic; the error of an element never exceeds the element, and the largest has none: contraction delta >= 1 / block; 'residual'
    is optional. Smaller blocks have a narrower range of magnitudes, and cost 4 bytes each.
    Source: Dettmers 2016. GRACE reads values beyond its table, the largest element among them, as NaN, and rounds down.
    """

    block: int | None = knob(None, "elements that share a scale; None: the whole tensor", low=1)

    def delta(self, d):
        return 1 / min(d, self.block or d)

    def fields(self, spec):
        return Field("scales", "float32", blocks(spec.size, self.block)[1]), Field("codes", "uint8", spec.size)

    def compress(self, ops, x, spec, info, state):
        if done := self.fused(ops, x, Feedback(None), spec, info, state):
            return done.payload, state
        block, _ = blocks(spec.size, self.block)
        scales = ops.block_norms(x, block, np.inf)
        relative = abs(x) / ops.spread(ops.where(scales > 0, scales, 1.0), block, spec.size)
        codes = ops.search(EDGES, relative) + 128 * ops.as_int(x < 0)
        return (floats_to_bytes(ops, scales), ops.pack(codes, 8)), state

    def fused(self, ops, grad, feedback, spec, info, state):
        if not ops.compiles(grad):
            return None
        sources, (block, number) = ops.sources(feedback, grad), blocks(spec.size, self.block)
        if (largest := ops.measured(sources)) is None:
            return None
        scales = np.array([largest]) if number == 1 else ops.block_norms(sources.x, block, np.inf)
        codes, units = np.empty(spec.size, np.uint8), scales.astype(np.float32)
        ops.kernels.encode_book(sources.x, sources.left, units, block, TABLE, LOWEST, BOOK, codes)
        return Fused((floats_to_bytes(ops, scales), codes), sources.unsent)

    def add_compiled(self, ops, total, payload, spec, first, divisor):
        scales = floats_from_bytes(ops, payload[0], "scale")
        ops.kernels.add_book(total, payload[1], scales, SIGNED_BOOK, blocks(spec.size, self.block)[0], first, np.float32(divisor))
        return True

    def decompress(self, ops, payload, spec, info):
        block, _ = blocks(spec.size, self.block)
        scales = floats_from_bytes(ops, payload[0], "scale")
        return ops.upload(SIGNED_BOOK)[ops.unpack(payload[1], 8, spec.size)] * ops.spread(scales, block, spec.size)
