from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import PayloadError
from ..parts import knob
from . import register
from .base import Compressor, Field

LARGEST = float(np.finfo(np.float32).max)
# Added for each rank that votes: turns a tie into +1 and no majority around, in exact float32 sums of up to 1,023 ranks.
TIE_BREAK = 2.0**-13


def _blocks(size: int, block: int | None) -> tuple[int, int]:
    """(elements a block, number of blocks)."""
    block = min(block or size, size)
    return block, -(-size // block)


@register("signsgd")
@dataclass(frozen=True)
class SignSGD(Compressor):
    """Sends signs, and takes the majority vote.

    Payload sign(x_j), one bit; zeros count as +1, but a tensor that is zero everywhere casts no vote. Result: sign(sum over ranks),
    in {-1, 0, +1}: NOT divided by the world size, whatever `op` is.  x: float[d] -> ceil(d / 8) + 1 bytes.
    Ties (even worlds) give 0, or +1 with ties='plus'. Neither unbiased nor a contraction; the step has length sqrt(d), so choose a
    learning rate 10 to 100 times lower than for SGD. Without error feedback it fails on simple problems; 'efsignsgd' with
    'residual' does not. Source: Bernstein et al. 2018. GRACE sends a byte a sign.
    """

    wants_memory: ClassVar[bool] = True
    always_compresses: ClassVar[bool] = True
    ties: str = knob("zero", "what a tied vote gives", choices=("zero", "plus"))

    def fields(self, spec):
        return Field("votes", "uint8", 1), Field("signs", "uint8", (spec.size + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        votes = np.array([ops.any_nonzero(x)], np.uint8)
        return (ops.upload(votes), ops.pack_signs(x)), state

    def decompress(self, ops, payload, spec, info):
        votes = int(payload[0][0])
        if votes > 1:
            raise PayloadError(f"has a vote flag of {votes}")
        return ops.unpack_signs(payload[1], spec.size) if votes else ops.zeros(spec.size)

    def accumulate(self, ops, total, payload, spec, info):
        total += self.decompress(ops, payload, spec, info)
        if self.ties == "plus" and int(payload[0][0]):
            total += TIE_BREAK

    def aggregate(self, ops, total, spec, info):
        return ops.sign(total)


@register("efsignsgd")
@dataclass(frozen=True)
class EFSignSGD(Compressor):
    """Sends signs and one scale a block, the mean magnitude.

    C(x) = (||x||_1 / d) sign(x), per block of `block` elements (default: the whole tensor); zeros count as +1.
    x: float[d] -> ceil(d / 8) bytes of signs and 4 bytes a block. The mean of the ranks is the result.
    Contraction delta = ||x||_1^2 / (d ||x||_2^2), 2/pi for Gaussian entries; biased: pair with 'residual'. A zero block decodes to zeros.
    Smaller blocks follow the gradient more closely and cost 4 bytes each. Source: Karimireddy, Rebjock, Stich, Jaggi 2019.
    """

    wants_memory: ClassVar[bool] = True
    block: int | None = knob(None, "elements that share a scale; None: the whole tensor", low=1)

    def fields(self, spec):
        _, blocks = _blocks(spec.size, self.block)
        return Field("scales", "float32", blocks), Field("signs", "uint8", (spec.size + 7) // 8)

    def compress(self, ops, x, spec, info, state):
        block, blocks = _blocks(spec.size, self.block)
        counts = np.full(blocks, block)
        counts[-1] = spec.size - block * (blocks - 1)
        scales = np.minimum(ops.block_norms(x, block, 1) / counts, LARGEST).astype(np.float32)
        return (ops.to_bytes(ops.upload(scales), "float32"), ops.pack_signs(x)), state

    def decompress(self, ops, payload, spec, info):
        block, _ = _blocks(spec.size, self.block)
        scales = ops.host(ops.from_bytes(payload[0], "float32"))
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise PayloadError("has a scale that is negative or not finite")
        return ops.unpack_signs(payload[1], spec.size) * ops.spread(scales, block, spec.size)
