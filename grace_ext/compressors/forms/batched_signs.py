"""Compresses all tensors of a bucket as one, for devices, if they are sent as signs and a few floats of each; see batched.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base import sent_by
from .merged import Merged

if TYPE_CHECKING:
    from ...parts.ops import Array, Ops
    from ..fast_path import Payload


class BatchedSigns(Merged):
    """Handles the tensors of a bucket for a TwoSided compressor, each of one block.

    Signs are packed, and sums of the ranks made, of the tensors laid end to end with gaps, so that each begins with a whole byte."""

    @cached_property
    def _number(self) -> int:
        """How many floats are sent of each tensor."""
        return len(self.each.fields(self.specs[0])) - 1

    @cached_property
    def _widths(self) -> np.ndarray:
        """float64: the elements of each tensor."""
        return self.sizes.astype(np.float64)

    @cached_property
    def _bytes(self) -> list[int]:
        """The bytes of each tensor's signs."""
        return [(size + 7) // 8 for size in self.sizes.tolist()]

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes in the payload: (of the floats, the first of all tensors, then the second of all; of the signs)."""
        floats, signs, at = [], [], 0
        for count in self._bytes:
            floats.append(at + np.arange(4 * self._number).reshape(self._number, 4))
            signs.append(at + 4 * self._number + np.arange(count))
            at += 4 * self._number + count
        return np.stack(floats, axis=1).reshape(-1), np.concatenate(signs)

    def _with_gaps(self, ops: Ops, x: Array) -> Array:
        gap, pieces = ops.zeros(7) - 1, []  # of negative numbers, whose bits are 0 as those that fill up a byte
        for here, count in zip(self._slices, self._bytes, strict=True):
            pieces += [x[here], gap[: 8 * count - (here.stop - here.start)]]
        return ops.concat(pieces)

    def _without_gaps(self, ops: Ops, x: Array) -> Array:
        starts = np.cumsum([0, *(8 * count for count in self._bytes[:-1])]).tolist()
        return ops.concat([x[start : start + size] for start, size in zip(starts, self.sizes.tolist(), strict=True)])

    def compress(self, ops, x, spec, info, state):
        floats = self.each.floats(ops, self.each.sums(ops, x, self.ends), ops.upload_once(self._widths))
        signs, pieces = ops.pack_signs(self._with_gaps(ops, x)), []
        for tensor, (start, end) in enumerate(pairwise(np.cumsum([0, *self._bytes]).tolist())):
            pieces += [*(each[4 * tensor : 4 * tensor + 4] for each in floats), signs[start:end]]
        return (ops.concat(pieces),), state

    def _sum(self, ops: Ops, payloads: Sequence[Payload]) -> Array:
        """Returns the sum of the ranks' elements, in rank order. Raises PayloadError."""
        data = ops.concat([payload for (payload,) in payloads]).reshape(len(payloads), -1)
        floats_at, signs_at = (ops.upload_once(places) for places in self._places)
        floats = data[:, floats_at].reshape(len(data), self._number, -1)
        count, name = 8 * len(signs_at), ", ".join(spec.name for spec in self.specs)
        signs = ops.unpack_signs(data[:, signs_at].reshape(-1), len(data) * count).reshape(len(data), -1)
        owner, total = ops.owners(np.cumsum(self._bytes) * 8, count), ops.zeros(count)
        for rank in range(len(data)):
            with sent_by(rank, name):
                below, above = self.each.sides(ops, tuple(floats[rank]))
            total += ops.where(signs[rank] > 0, above[owner], below[owner])
        return self._without_gaps(ops, total)

    def combine(self, ops, payloads, spec, info, out=None):
        return self.aggregate(ops, self._sum(ops, payloads), spec, info)

    def decompress(self, ops, payload, spec, info):
        return self._sum(ops, [payload])

    def add_all(self, ops: Any, total: Array, payloads: Sequence[Payload], spec: Any, info: Any) -> bool:
        total[:] = self.combine(ops, payloads, spec, info)
        return True
