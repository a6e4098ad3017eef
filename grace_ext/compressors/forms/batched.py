"""Compresses all tensors of a bucket as one by array operations alone, for devices: how many are started does not grow with the tensors.

The bytes are those of each tensor by itself, one after the other, as of merged.py, so it does not matter which ranks do this.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import PayloadError
from ...parts.field import ITEMSIZE
from .merged import Merged
from .positions import index_bytes, parts_of_code

if TYPE_CHECKING:
    from ...parts.ops import Array, Ops
    from ..fast_path import Payload


class Stretches(NamedTuple):
    """Says where one kind of bytes of all tensors is in the payload of the whole. ends: where each tensor's end, if only they are laid end
    to end; shift: from there to their place in the payload."""

    ends: np.ndarray
    shift: np.ndarray

    @property
    def total(self) -> int:
        """How many bytes of this kind there are."""
        return int(self.ends[-1])

    def places(self, ops: Ops) -> Array:
        """Returns int64: the places of these bytes in the payload."""
        return ops.arange(self.total) + ops.upload_once(self.shift)[ops.owners(self.ends, self.total)]


class Coded(NamedTuple):
    """Describes, for each tensor whose positions are coded, because not all of its elements are sent: int64[tensors] each.

    start, size: of the tensor in the array. first: the place of its first sent element among those of all of them. low, step: of its code
    (positions.parts_of_code). high_at, low_at: its first bit among the high parts, and among the low bits, of all of them."""

    start: np.ndarray
    size: np.ndarray
    first: np.ndarray
    low: np.ndarray
    step: np.ndarray
    high_at: np.ndarray
    low_at: np.ndarray


class BatchedSelecting(Merged):
    """Handles the tensors of a bucket for a compressor that sends the largest elements of each, with positions coded as 'auto' says.

    What is kept from step to step has one number per tensor; one per sent element could be more than the residual."""

    @cached_property
    def most(self) -> np.ndarray:
        """How many values of each tensor are sent."""
        return np.array([self.each.most(spec.size) for spec in self.specs])

    @cached_property
    def _codes(self) -> list[tuple[int, int, int]]:
        """What `parts_of_code` returns for each tensor."""
        return [parts_of_code(k, d) for k, d in zip(self.most.tolist(), self.sizes.tolist(), strict=True)]

    @cached_property
    def _bytes(self) -> tuple[Stretches, Stretches, Stretches]:
        """The places of three kinds of bytes, in the order in which each tensor has them: values, low bits and high parts of positions."""
        low = np.array([code[2] for code in self._codes])
        index = np.array([index_bytes(k, d) for k, d in zip(self.most.tolist(), self.sizes.tolist(), strict=True)])
        counts = np.stack([ITEMSIZE[self.each.wire] * self.most, low, index - low])
        starts = np.cumsum(counts.T.reshape(-1)).reshape(-1, 3).T - counts
        ends = np.cumsum(counts, axis=1)
        values_in, low_in, high_in = (Stretches(its, start - its + count) for its, start, count in zip(ends, starts, counts, strict=True))
        return values_in, low_in, high_in

    @cached_property
    def _coded(self) -> Coded:
        coded = self.most < self.sizes
        low, step, low_bytes = np.array(self._codes).T
        high_bytes = np.diff(self._bytes[2].ends, prepend=0)
        most = self.most * coded
        columns = (
            self.ends - self.sizes, self.sizes, np.cumsum(most) - most, low, step,
            8 * (np.cumsum(high_bytes) - high_bytes), 8 * (np.cumsum(low_bytes) - low_bytes),
        )  # fmt: skip
        return Coded(*(np.ascontiguousarray(column[coded]) for column in columns))

    @cached_property
    def _coded_ends(self) -> np.ndarray:
        """The end of each coded tensor's sent elements, if these are laid end to end."""
        return np.cumsum(self.most[self.most < self.sizes])

    @cached_property
    def _runs(self) -> list[tuple[slice, slice | None]]:
        """Two slices for each tensor: its elements among all that are sent, and among those that have coded positions. The second is None
        if the tensor is sent whole."""
        runs, at = [], 0
        for end, k, d in zip(np.cumsum(self.most).tolist(), self.most.tolist(), self.sizes.tolist(), strict=True):
            runs.append((slice(end - k, end), slice(at, at + k) if k < d else None))
            at += k * (k < d)
        return runs

    def _elements(self, ops: Ops) -> tuple[Coded, Array]:
        """Returns `_coded` of each sent element with a coded position, and its place among those of its tensor."""
        owner = ops.owners(self._coded_ends, int(self._coded_ends[-1]))
        found = Coded._make(ops.upload_once(column)[owner] for column in self._coded)
        return found, ops.arange(len(owner)) - found.first

    def _low_places(self, ops: Ops, of: Coded, rank: Array, beyond: int) -> tuple[Array, Array]:
        """Returns two arrays. int64[m, b] has, for each element, the places of its low bits among the low bits of all elements, and
        `beyond` for bits that it does not have. int64[b] is 0, 1, ..."""
        bit = ops.arange(int(self._coded.low.max()))
        return ops.where(bit < of.low[:, None], (of.low_at + rank * of.low)[:, None] + bit, beyond), bit

    # --- one rank's payload -------------------------------------------------------------------------------------------
    def compress(self, ops, x, spec, info, state):
        positions, (values, low, high) = ops.largest_each(x, self.ends, self.most), self._bytes
        payload = ops.zeros(values.total + low.total + high.total, "uint8")
        payload[values.places(ops)] = ops.to_bytes(x[positions], self.each.wire)
        if len(self._coded_ends):
            of, rank = self._elements(ops)
            if len(of.start) < len(positions):
                positions = ops.concat([positions[run] for run, coded in self._runs if coded])
            own, ones = positions - of.start, ops.zeros(8 * high.total, "uint8")
            ones[(own >> of.low) + of.high_at + rank * of.step] = 1
            payload[high.places(ops)] = ops.pack(ones, 1)
            if low.total:
                at, bit = self._low_places(ops, of, rank, 8 * low.total)
                bits = ops.zeros(8 * low.total + 1, "uint8")  # the last is for bits that do not exist
                bits[at.reshape(-1)] = ops.cast((own[:, None] >> bit) & 1, "uint8").reshape(-1)
                payload[low.places(ops)] = ops.pack(bits[:-1], 1)
        return (payload,), state

    # --- the payloads of n ranks --------------------------------------------------------------------------------------
    def _decoded(self, ops: Ops, payloads: Sequence[Payload]) -> tuple[list[Array], Array]:
        """Returns (the positions of each rank's values, ascending; float32[n, m]: the values). Raises PayloadError."""
        data, (values_in, _, _) = ops.concat([payload for (payload,) in payloads]).reshape(len(payloads), -1), self._bytes
        values = ops.from_bytes(data[:, values_in.places(ops)].reshape(-1), self.each.wire).reshape(len(data), -1)
        self._require(ops, (abs(values) < np.inf).all(1), data, "has a value that is not finite")
        coded = self._positions(ops, data) if len(self._coded_ends) else data[:, :0]
        if coded.shape == values.shape:
            return list(coded), values
        every = ops.arange(int(self.ends[-1]))
        return [
            ops.concat([every[here] if run is None else coded[rank, run] for here, (_, run) in zip(self._slices, self._runs, strict=True)])
            for rank in range(len(data))
        ], values

    def _positions(self, ops: Ops, data: Array) -> Array:
        """Returns int64[n, c]: the coded positions."""
        (_, low, high), (of, rank) = self._bytes, self._elements(ops)
        ones, right = ops.ones_of(data[:, high.places(ops)].reshape(-1), len(data) * len(rank))
        ops.require(right, lambda: self._blame(ops, data))
        own = ones.reshape(len(data), -1) - ops.arange(len(data)).reshape(-1, 1) * (8 * high.total)
        own = own - of.high_at - rank * of.step << of.low
        if low.total:
            at, bit = self._low_places(ops, of, rank, 0)
            bits = ops.unpack(data[:, low.places(ops)].reshape(-1), 1, 8 * len(data) * low.total).reshape(len(data), -1)
            found = bits[:, at.reshape(-1)].reshape(len(data), *at.shape) * ops.as_int(bit < of.low[:, None])
            own = own | (found << bit).sum(-1)
        self._require(ops, ((own >= 0) & (own < of.size)).all(1), data, "has an index out of range")
        positions = ops.within(own + of.start, int(self.ends[-1]))
        self._require(ops, (positions[:, 1:] > positions[:, :-1]).all(1), data, "has indices that repeat or are out of order")
        return positions

    def _require(self, ops: Ops, by_rank: Array, data: Array, otherwise: str) -> None:
        def blame() -> None:
            rank = int(ops.host(ops.as_int(by_rank)).argmin())
            self.explain(ops, (data[rank],), rank)
            raise PayloadError(otherwise, rank, ", ".join(spec.name for spec in self.specs))

        ops.require(by_rank.all(), blame)

    def _blame(self, ops: Ops, data: Array) -> None:
        """Raises the PayloadError of the rank whose positions cannot be decoded."""
        for rank in range(len(data)):
            self.explain(ops, (data[rank],), rank)

    def combine(self, ops, payloads, spec, info, out=None):
        total, (positions, values) = ops.zeros(spec.size), self._decoded(ops, payloads)
        for rank in range(len(payloads)):
            total[positions[rank]] += values[rank]
        return self.aggregate(ops, total, spec, info)

    def decompress(self, ops, payload, spec, info):
        dense, ((positions,), (values,)) = ops.zeros(spec.size), self._decoded(ops, [payload])
        dense[positions] = values
        return dense

    def remove(self, ops, x, payload, spec, info):
        (positions,), (values,) = self._decoded(ops, [payload])
        x[positions] -= values

    def add_all(self, ops, total, payloads, spec, info):
        total[:] = self.combine(ops, payloads, spec, info)
        return True
