"""efsignsgd and onebit share this base: signs, and two floats per block that the signs decode to."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ...errors import PayloadError
from ..base import Compressor, sent_by
from ..fast_path import Fused
from .batched_signs import BatchedSigns, heads_in
from .merged import Merged
from .scales import blocks

if TYPE_CHECKING:
    from ...parts.ops import Array, Ops
    from ..fast_path import Payload


class TwoSided(Compressor):
    """The base of compressors whose payload is floats, then signs. Per block, elements below zero decode to one value, the others to
    another."""

    #: How many sums per tensor `floats` needs: 1, that of all magnitudes, or 3; see `ops.compensate_signs`.
    number_of_sums: ClassVar[int] = 1
    block: int | None

    @abstractmethod
    def sides(self, ops: Ops, floats: Payload) -> tuple[np.ndarray, np.ndarray]:
        """Returns what elements below zero decode to, and the others: float32[number of blocks] each. Raises PayloadError."""

    @abstractmethod
    def floats(self, ops: Ops, sums: Array, d: Array) -> Payload:
        """Returns the payload's floats for tensors of one block each, with `d` elements, from the sums of each."""

    def decompress(self, ops, payload, spec, info):
        block, _ = blocks(spec.size, self.block)
        below, above = (ops.spread(values, block, spec.size) for values in self.sides(ops, payload[:-1]))
        return ops.where(ops.unpack_signs(payload[-1], spec.size) > 0, above, below)

    def combine(self, ops, payloads, spec, info, out=None):
        block, number = blocks(spec.size, self.block)
        if not ops.kernels or (number > 1 and block % 8):
            return super().combine(ops, payloads, spec, info, out)
        sides = []
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                sides.append(self.sides(ops, payload[:-1]))
        below, above = (np.concatenate(side) for side in zip(*sides, strict=True))
        total, signs = ops.empty(spec.size) if out is None else out, ops.concat([payload[-1] for payload in payloads])
        ops.kernels.sum_signs(total, signs, below, above, block, np.float32(info.divisor))
        return total

    def fused(self, ops, grad, feedback, spec, info, state):
        if feedback.residual is None or blocks(spec.size, self.block)[1] > 1 or grad.dtype != np.float32:
            return None
        if (done := ops.compensate_signs(feedback, grad, self.number_of_sums)) is None:
            return None
        x, signs, sums = done
        floats = self.floats(ops, sums[:, None], np.array([spec.size]))
        (below,), (above,) = self.sides(ops, floats)
        ops.kernels.subtract_signs(x, below, above)
        return Fused((*floats, signs), x)

    def heads_of(self, ops: Ops, x: Array, ends: np.ndarray, sizes: Array) -> Payload:
        """Returns the `floats` of the tensors that end there; sizes: float64, their elements."""
        if self.number_of_sums == 1:
            parts: tuple[Array, ...] = (x,)
        else:
            below = x < 0
            parts = ops.where(below, x, 0.0), ops.where(below, 0.0, x), ops.cast(ops.as_int(below), "float32")
        return self.floats(ops, [ops.sums_of_each(part, ends) for part in parts], sizes)

    def sides_of(self, ops: Ops, heads: Payload, summing: bool) -> tuple[Array, Array]:
        """Returns `sides`, for the sum of all ranks or for what one rank sent."""
        return self.sides(ops, heads)

    def batched(self, specs):
        return BatchedSigns(self, specs) if all(blocks(spec.size, self.block)[1] == 1 for spec in specs) else None

    def merged(self, specs):
        return MergedSigns(self, specs) if all(blocks(spec.size, self.block)[1] == 1 for spec in specs) else None


class MergedSigns(Merged):
    """Merges small tensors of a TwoSided compressor, each of one block."""

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Byte positions in the payload: (of the floats, the first of all tensors, then the second of all; of the signs)."""
        floats = heads_in([4] * (len(self.each.fields(self.specs[0])) - 1), [(spec.size + 7) // 8 for spec in self.specs])
        every = np.arange(sum(field.max_bytes for field in self._fields))
        return floats, np.setdiff1d(every, floats)

    def fused(self, ops, grad, feedback, spec, info, state):
        if feedback.residual is None:
            return None
        floats_at, signs_at = self._places
        total, signs, sums = ops.empty(spec.size), np.empty(len(signs_at), np.uint8), np.zeros((len(self.specs), self.each.number_of_sums))
        factors = np.float32(feedback.beta), np.float32(feedback.gamma)
        if not ops.kernels.compensate_signs_each(feedback.residual, grad, *factors, self.ends, total, signs, sums.reshape(-1)):
            return None
        floats = self.each.floats(ops, sums.T, self.sizes)
        ops.kernels.subtract_signs_each(total, *self.each.sides(ops, floats), self.ends)
        payload = np.empty(floats_at.size + len(signs), np.uint8)
        payload[signs_at] = signs
        for places, piece in zip(floats_at, floats, strict=True):
            payload[places] = piece
        return Fused((payload,), total)

    def add_all(self, ops, total, payloads, spec, info):
        floats_at, signs_at = self._places
        try:
            sides = [self.each.sides(ops, [data[places] for places in floats_at]) for (data,) in payloads]
        except PayloadError:
            return False
        below, above = (np.concatenate(side) for side in zip(*sides, strict=True))
        signs = np.concatenate([data[signs_at] for (data,) in payloads])
        ops.kernels.sum_signs_each(total, signs, below, above, self.ends, np.float32(info.divisor))
        return True
