"""Compresses all tensors of a bucket as one, for devices, if they are sent as signs and a few bytes of each; see batched.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base import sent_by
from .batched import Stretches
from .merged import Merged

if TYPE_CHECKING:
    from ...parts.ops import Array, Ops
    from ..fast_path import Payload


def heads_in(fields: Sequence[int], signs: Sequence[int]) -> np.ndarray:
    """Returns int64[fields, bytes]: the places, in a payload of several tensors, of the bytes of each field that comes before their signs.
    fields: the bytes of each of them, all equal; signs: the bytes of each tensor's signs."""
    starts = np.cumsum([0, *(sum(fields) + count for count in signs[:-1])])
    return (starts[None, :, None] + fields[0] * np.arange(len(fields))[:, None, None] + np.arange(fields[0])).reshape(len(fields), -1)


class BatchedSigns(Merged):
    """Handles the tensors of a bucket, each of one block, for a compressor that sends a head and signs, and has `heads_of` and `sides_of`.

    Signs are packed, and sums of the ranks made, of the tensors laid end to end with gaps, so that each begins with a whole byte."""

    @cached_property
    def _fields_of_head(self) -> list[int]:
        """The bytes of each field that comes before a tensor's signs."""
        return [field.max_bytes for field in self.each.fields(self.specs[0])[:-1]]

    @cached_property
    def _widths(self) -> np.ndarray:
        """float64: the elements of each tensor."""
        return self.sizes.astype(np.float64)

    @cached_property
    def _bytes(self) -> list[int]:
        """The bytes of each tensor's signs."""
        return [(size + 7) // 8 for size in self.sizes.tolist()]

    @cached_property
    def _heads_in(self) -> np.ndarray:
        """The places of the bytes of heads in the payload: of the first field of all tensors, then of the second of all."""
        return heads_in(self._fields_of_head, self._bytes).reshape(-1)

    @cached_property
    def _signs_in(self) -> Stretches:
        """The places of the bytes of signs in the payload."""
        return Stretches(np.cumsum(self._bytes), sum(self._fields_of_head) * np.arange(1, len(self._bytes) + 1))

    def _with_gaps(self, ops: Ops, x: Array) -> Array:
        gap, pieces = ops.zeros(7) - 1, []  # of negative numbers, whose bits are 0 as those that fill up a byte
        for here, count in zip(self._slices, self._bytes, strict=True):
            pieces += [x[here], gap[: 8 * count - (here.stop - here.start)]]
        return ops.concat(pieces)

    def _without_gaps(self, ops: Ops, x: Array) -> Array:
        starts = np.cumsum([0, *(8 * count for count in self._bytes[:-1])]).tolist()
        return ops.concat([x[start : start + size] for start, size in zip(starts, self.sizes.tolist(), strict=True)])

    def compress(self, ops, x, spec, info, state):
        heads, width = self.each.heads_of(ops, x, self.ends, ops.upload_once(self._widths)), self._fields_of_head[0]
        signs, pieces = ops.pack_signs(self._with_gaps(ops, x)), []
        for tensor, (start, end) in enumerate(pairwise(np.cumsum([0, *self._bytes]).tolist())):
            pieces += [*(each[width * tensor : width * tensor + width] for each in heads), signs[start:end]]
        return (ops.concat(pieces),), state

    def _sum(self, ops: Ops, payloads: Sequence[Payload], summing: bool) -> Array:
        """Returns the sum of the ranks' elements, in rank order. Raises PayloadError."""
        data = ops.concat([payload for (payload,) in payloads]).reshape(len(payloads), -1)
        heads = data[:, ops.upload_once(self._heads_in)].reshape(len(data), len(self._fields_of_head), -1)
        count, name = 8 * self._signs_in.total, ", ".join(spec.name for spec in self.specs)
        signs = ops.unpack_signs(data[:, self._signs_in.places(ops)].reshape(-1), len(data) * count).reshape(len(data), -1)
        owner, total = ops.owners(np.cumsum(self._bytes) * 8, count), ops.zeros(count)
        for rank in range(len(data)):
            with sent_by(rank, name, partial(self.explain, ops, (data[rank],), rank)):
                below, above = self.each.sides_of(ops, tuple(heads[rank]), summing)
            total += ops.where(signs[rank] > 0, above[owner], below[owner])
        return self._without_gaps(ops, total)

    def combine(self, ops, payloads, spec, info, out=None):
        return self.each.aggregate(ops, self._sum(ops, payloads, True), spec, info)

    def decompress(self, ops, payload, spec, info):
        return self._sum(ops, [payload], False)

    def add_all(self, ops: Any, total: Array, payloads: Sequence[Payload], spec: Any, info: Any) -> bool:
        total[:] = self.combine(ops, payloads, spec, info)
        return True
