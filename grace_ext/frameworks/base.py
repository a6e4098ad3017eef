"""What a transport is, and how one that lacks a collective carries it by those that it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

import numpy as np

from ..exchange import Collective
from ..ops import Array, Ops

Carried = Generator[Collective, Any, Any]


class Transport(ABC):
    """The asynchronous collectives of one engine among `size` ranks."""

    rank: int
    size: int
    #: Collectives are matched by name; else by the order in which they are started, which driver.py makes the same everywhere.
    named: bool = False

    @abstractmethod
    def start(self, collective: Collective, name: str) -> Any:
        """Starts it without blocking; returns a handle. The array is not changed before `wait` has returned."""

    @abstractmethod
    def wait(self, handle: Any) -> Any:
        """Blocks; returns the result (see Collective)."""

    def carry(self, collective: Collective) -> Carried:
        """Yields collectives that this engine has, one at a time, and returns the result of the one that was asked for."""
        return (yield collective)


def half_sum(ops: Ops, collective: Collective, rank: int, size: int) -> Carried:
    """A 16-bit all-reduce: every rank gets its share of all arrays, adds it in float32 in rank order, divides, rounds once, and the
    shares are gathered. The same bits on every engine and for every number of ranks."""
    dtype, count = collective.dtype, len(collective.array)
    bounds = [2 * (count * r // size) for r in range(size + 1)]
    data = ops.to_bytes(collective.array, dtype)
    sizes = tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    pieces = yield Collective("alltoall", data, collective.label + ".scatter", sizes=sizes)
    share = rank_ordered_mean([ops.from_bytes(piece, dtype) for piece in pieces], collective.divisor)
    mine = ops.to_bytes(share, dtype)
    gathered = yield from uneven_gather(ops, Collective("allgather", mine, collective.label + ".gather", sizes=sizes))
    return ops.concat([ops.from_bytes(piece, dtype) for piece in gathered])


def rank_ordered_mean(arrays: list[Array], divisor: int) -> Array:
    """(a_0 + a_1 + ...) / divisor, added in rank order in the arrays' own precision."""
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total / divisor


def uneven_gather(ops: Ops, collective: Collective) -> Carried:
    """An all-gather of arrays of different lengths for an engine that needs equal ones: lengths are exchanged first where they are not
    known already, and the shorter arrays are padded with zeros."""
    data, sizes = collective.array, collective.sizes
    if sizes is None:
        own = ops.upload(np.array([len(data)], np.int64).view(np.uint8))
        lengths = yield Collective("allgather", own, collective.label + ".size", sizes=collective.sizes, equal=True)
        sizes = tuple(int(np.ascontiguousarray(ops.host(length)).view(np.int64)[0]) for length in lengths)
    longest = max(sizes)
    padded = data if len(data) == longest else ops.concat([data, ops.upload(np.zeros(longest - len(data), np.uint8))])
    received = yield collective._replace(array=padded, sizes=(longest,) * len(sizes), equal=True)
    return [piece[:size] for piece, size in zip(received, sizes, strict=True)]


def sized_broadcast(ops: Ops, collective: Collective) -> Carried:
    """Every rank's array to all by broadcasts, which must know all lengths: exchanged first where they are not known."""
    if collective.sizes is None:
        own = ops.upload(np.array([len(collective.array)], np.int64).view(np.uint8))
        lengths = yield Collective("allgather", own, collective.label + ".size", equal=True)
        sizes = tuple(int(np.ascontiguousarray(ops.host(length)).view(np.int64)[0]) for length in lengths)
        collective = collective._replace(sizes=sizes)
    return (yield collective)
