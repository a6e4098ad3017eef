"""EF-SignSGD sends signs, scaled so that error feedback converges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.field import Field
from ..parts.part import knob
from . import register
from .forms.scales import blocks, counts, floats_from_bytes, floats_to_bytes
from .forms.two_sided import TwoSided


@register("efsignsgd")
@dataclass(frozen=True)
class EFSignSGD(TwoSided):
    """Sends signs and one scale per block, the mean magnitude.

    C(x) = (||x||_1 / d) sign(x), per block of `block` elements (default: the whole tensor); zeros count as +1.
    x: float[d] -> ceil(d / 8) bytes of signs and 4 bytes per block. The result is the mean over the ranks.
    Contraction delta = ||x||_1^2 / (d ||x||_2^2), 2/pi for Gaussian entries; biased: pair with 'residual'.
    A zero block decodes to zeros: with a `block` that divides the rows of an embedding, rows that had no gradient yet stay as they are;
    otherwise they move by +-scale. Smaller blocks follow the gradient more closely and cost 4 bytes each.
    Source: Karimireddy, Rebjock, Stich, Jaggi 2019.
    """

    wants_memory: ClassVar[bool] = True
    block: int | None = knob(None, "elements that share a scale; None: the whole tensor", low=1)

    def delta(self, d):
        return 1 / min(d, self.block or d)

    def fields(self, spec):
        return Field("scales", "float32", blocks(spec.size, self.block)[1]), Field("signs", "uint8", (spec.size + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        scales = ops.block_norms(x, blocks(spec.size, self.block)[0], 1) / ops.upload(counts(spec.size, self.block).astype(np.float64))
        return (floats_to_bytes(ops, scales), ops.pack_signs(x)), state

    def sides(self, ops, floats):
        scales = floats_from_bytes(ops, floats[0], "scale")
        return -scales, scales

    def floats(self, ops, sums, d):
        return (floats_to_bytes(ops, sums[0] / d),)
