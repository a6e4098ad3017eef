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


class Places(NamedTuple):
    """Says where the values and the positions of all tensors are in the payload of the whole. m: the number of sent elements; c: of those
    whose positions are coded, because not all elements of their tensor are sent; b: the most low bits of a position.

    starts, sizes: int64[c], of each element's tensor. low: int64[c], its low bits. high: int64[c]: its bit among all high parts, less what
    its position adds to it. low_at: int64[c * b]: its low bits among all bits, the high parts first; those that it does not have are at the
    end, where nothing is. coded: int64[c], which elements these are; None if all. whole: int64[m]: the positions of the others.
    values_in, high_in, low_in: the bytes of values and of these parts in the payload. order: of its bytes, of these three in a row."""

    starts: np.ndarray
    sizes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    low_at: np.ndarray
    coded: np.ndarray | None
    whole: np.ndarray
    values_in: np.ndarray
    high_in: np.ndarray
    low_in: np.ndarray
    order: np.ndarray


class BatchedSelecting(Merged):
    """Handles the tensors of a bucket for a compressor that sends the largest elements of each, with positions coded as 'auto' says."""

    @cached_property
    def most(self) -> np.ndarray:
        """How many values of each tensor are sent."""
        return np.array([self.each.most(spec.size) for spec in self.specs])

    @cached_property
    def _places(self) -> Places:
        item, at, high_bits, low_bits = ITEMSIZE[self.each.wire], 0, 0, 0
        columns: dict[str, list[np.ndarray]] = {name: [] for name in Places._fields}
        tensors = list(zip(self.most.tolist(), self.sizes.tolist(), self.ends.tolist(), strict=True))
        deepest = max(parts_of_code(k, d)[0] for k, d, _ in tensors)
        for k, d, end in tensors:
            rank, start = np.arange(k), end - d
            low, step, low_bytes = parts_of_code(k, d)
            code = index_bytes(k, d)
            inside = np.arange(at, at + item * k + code)
            columns["values_in"].append(inside[: item * k])
            columns["low_in"].append(inside[item * k : item * k + low_bytes])
            columns["high_in"].append(inside[item * k + low_bytes :])
            columns["whole"].append(start + rank)
            columns["coded"].append(np.full(k, k < d))
            if k < d:
                columns["starts"].append(np.full(k, start))
                columns["sizes"].append(np.full(k, d))
                columns["low"].append(np.full(k, low))
                columns["high"].append(high_bits + step * rank)
                bit = np.arange(deepest)
                columns["low_at"].append(np.where(bit < low, low_bits + low * rank[:, None] + bit, -1).reshape(-1))
            at += len(inside)
            high_bits += 8 * (code - low_bytes)
            low_bits += 8 * low_bytes
        found = {name: np.concatenate(arrays or [np.zeros(0, np.int64)]) for name, arrays in columns.items() if name != "order"}
        found["low_at"] = np.where(found["low_at"] < 0, high_bits + low_bits, high_bits + found["low_at"])
        coded = found.pop("coded")
        order = np.empty(at, np.int64)
        order[np.concatenate([found["values_in"], found["high_in"], found["low_in"]])] = np.arange(at)
        return Places(**found, coded=None if coded.all() else np.flatnonzero(coded), order=order)

    def _on(self, ops: Ops) -> Places:
        """Returns `_places` in the library's arrays."""
        return Places._make(None if array is None else ops.upload_once(array) for array in self._places)

    # --- one rank's payload -------------------------------------------------------------------------------------------
    def compress(self, ops, x, spec, info, state):
        positions, at = ops.largest_each(x, self.ends, self.most), self._on(ops)
        pieces = [ops.to_bytes(x[positions], self.each.wire)]
        if len(at.starts):
            own = (positions if at.coded is None else positions[at.coded]) - at.starts
            bits = ops.zeros(8 * (len(at.high_in) + len(at.low_in)) + 1, "uint8")
            bits[(own >> at.low) + at.high] = 1
            if len(at.low_at):
                bits[at.low_at] = ops.cast((own[:, None] >> self._low_bits(ops)) & 1, "uint8").reshape(-1)
            pieces.append(ops.pack(bits[:-1], 1))
        return (ops.concat(pieces)[at.order],), state

    def _low_bits(self, ops: Ops) -> Array:
        """Returns int64[b]: 0, 1, ..."""
        return ops.arange(len(self._places.low_at) // len(self._places.starts))

    # --- the payloads of n ranks --------------------------------------------------------------------------------------
    def _decoded(self, ops: Ops, payloads: Sequence[Payload]) -> tuple[Array, Array]:
        """Returns (int64[n, m]: the positions, ascending; float32[n, m]: the values). Raises PayloadError."""
        data, at = ops.concat([payload for (payload,) in payloads]).reshape(len(payloads), -1), self._on(ops)
        values = ops.from_bytes(data[:, at.values_in].reshape(-1), self.each.wire).reshape(len(data), -1)
        self._require(ops, (abs(values) < np.inf).all(1), data, "has a value that is not finite")
        if not len(at.starts):
            return ops.arange(len(data)).reshape(-1, 1) * 0 + at.whole, values
        ones, right = ops.ones_of(data[:, at.high_in].reshape(-1), len(data) * len(at.starts))
        ops.require(right, lambda: self._blame(ops, data))
        own = ones.reshape(len(data), -1) - ops.arange(len(data)).reshape(-1, 1) * (8 * len(at.high_in)) - at.high
        own = own << at.low
        if len(at.low_at):
            bits = ops.unpack(data[:, at.low_in].reshape(-1), 1, 8 * len(data) * len(at.low_in)).reshape(len(data), -1)
            bits = bits[:, ops.within(at.low_at - 8 * len(at.high_in), bits.shape[1])].reshape(*own.shape, -1)
            low = self._low_bits(ops)
            own = own | ((bits << low) * ops.as_int(low < at.low[:, None])).sum(-1)
        self._require(ops, ((own >= 0) & (own < at.sizes)).all(1), data, "has an index out of range")
        positions = ops.within(own + at.starts, int(self.ends[-1]))
        if at.coded is not None:
            every = ops.arange(len(data)).reshape(-1, 1) * 0 + at.whole
            every[:, at.coded] = positions
            positions = every
        self._require(ops, (positions[:, 1:] > positions[:, :-1]).all(1), data, "has indices that repeat or are out of order")
        return positions, values

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
