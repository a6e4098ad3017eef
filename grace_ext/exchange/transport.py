"""The interface of an engine's collectives, and how a collective that the engine lacks is carried by those that it has."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import CollectiveError, PayloadError, UnsupportedError
from ..parts.field import HALVES, INTEGERS, ITEMSIZE
from ..parts.ops import Array, Ops
from .effects import Collective
from .message import split_messages

#: Yields collectives that an engine has, one at a time, and returns the result of the one that was wanted.
Carried = Generator[Collective, Any, Any]
#: The most bytes of a message whose parts do not say how long it can be: what ranks share in an agreement.
LONGEST = 2**28


def this_node() -> str:
    """Returns a name that the ranks on this machine share: GRACE_EXT_NODE, torchrun's number of the node, or the host's name."""
    return os.environ.get("GRACE_EXT_NODE") or os.environ.get("GROUP_RANK") or socket.gethostname()


class Transport(ABC):
    """The asynchronous collectives of one engine among `size` ranks, for the arrays of `ops`."""

    rank: int
    size: int
    ops: Ops
    #: Whether the engine's all-gather takes arrays of different lengths; if not, lengths are exchanged and arrays padded.
    gathers_uneven: bool = False
    #: Whether the engine's all-to-all finds out by itself how much arrives; if not, every rank's sizes are exchanged.
    scatters_uneven: bool = False
    #: The error that is raised if the engine could not complete a collective.
    failure: type[CollectiveError] = CollectiveError
    #: Whether it has groups of ranks (`group`), which an exchange in two levels needs.
    splits: bool = False
    _groups: Mapping[str, Transport | None] = MappingProxyType({})

    @property
    def node(self) -> str:
        """A name that the ranks on this machine share."""
        return this_node()

    def group(self, ranks: Sequence[int]) -> Transport | None:
        """Returns a transport among these ranks, None on the others. All ranks call it alike, for each group in turn."""
        raise UnsupportedError(f"{type(self).__name__} has no groups of ranks")

    def split(self, groups: Sequence[Sequence[int]]) -> None:
        """Makes the groups of an exchange in two levels. The last group is between the nodes; one of the others is this rank's node."""
        *inside, between = [self.group(ranks) for ranks in groups]
        self._groups = {"inside": next(t for t in inside if t is not None), "between": between}

    def add_group(self, group: str, transport: Transport) -> None:
        """Lets this transport carry the collectives of a group of other ranks (see Collective), this rank among them."""
        self._groups = {**self._groups, group: transport}

    def among(self, group: str) -> Transport | None:
        """Returns the transport for collectives of a group (see Collective); None if this rank takes no part in them."""
        return self if group == "all" else self._groups.get(group)

    @property
    def pair(self) -> bool:
        """Whether there are two ranks: each can subtract its own part from a sum (see `by_sum`)."""
        return self.size == 2

    @abstractmethod
    def start(self, collective: Collective, name: str) -> Any:
        """Starts a collective without blocking; returns a handle. The array belongs to the transport until `wait` has returned."""

    @abstractmethod
    def wait(self, handle: Any) -> Any:
        """Blocks until the collective is complete; returns its result (see Collective)."""

    def carry(self, collective: Collective) -> Carried:
        """Yields collectives that this engine has, one at a time, and returns the result of the one that was wanted."""
        if collective.kind == "allreduce" and collective.dtype in (*HALVES, *INTEGERS):
            # Engines' own 16-bit sums round at every addition and are slow on a CPU; not all have sums of all integers.
            return (yield from ordered_sum(self, collective))
        if collective.kind == "allgather" and not self.gathers_uneven:
            return (yield from uneven_gather(self, collective))
        if collective.kind == "alltoall" and collective.received == () and not self.scatters_uneven:
            own = self.ops.upload(np.array(collective.sizes, np.int64).view(np.uint8))
            said = yield Collective("allgather", own, collective.label + ".size", sizes=(8 * self.size,) * self.size)
            received = tuple(int(_int64(self.ops, sizes)[self.rank]) for sizes in said)
            _check_announced(received, collective.limits)
            return (yield collective._replace(received=received))
        if collective.kind == "broadcast" and collective.sizes is None:
            sizes = yield from exchange_lengths(self, collective)
            return (yield collective._replace(sizes=sizes))
        return (yield collective)


def ordered_sum(transport: Transport, collective: Collective) -> Carried:
    """Sums 16-bit floats or integers: every rank gets its share of all arrays, adds it in rank order (in float32 or int64), divides,
    rounds once, and the shares are gathered. So the bits are the same on every engine and for every number of ranks. Of two ranks each
    gets all of the other's, which is as many bytes, in one round."""
    ops, dtype, size = transport.ops, collective.dtype, transport.size
    data = ops.to_bytes(collective.array, dtype) if dtype in INTEGERS else collective.array
    if transport.pair:
        whole = Collective("allgather", data, collective.label + ".gather", sizes=(len(data),) * size)
        return _added(ops, (yield from transport.carry(whole)), dtype, collective.divisor)
    count = len(data) // ITEMSIZE[dtype]
    bounds = [ITEMSIZE[dtype] * (count * rank // size) for rank in range(size + 1)]
    sizes = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    pieces = yield Collective("alltoall", data, collective.label + ".scatter", sizes=sizes)
    share = _added(ops, pieces, dtype, collective.divisor)
    if dtype in INTEGERS:
        share = ops.to_bytes(share, dtype)
    gather = Collective("allgather", share, collective.label + ".gather", sizes=sizes)
    gathered = yield from transport.carry(gather)
    return ops.concat([ops.from_bytes(piece, dtype) for piece in gathered] if dtype in INTEGERS else gathered)


def _added(ops: Ops, pieces: list[Array], dtype: str, divisor: int) -> Array:
    """Adds the ranks' pieces in rank order. Returns int64[] for integers, else the mean in its wire form."""
    if dtype in INTEGERS:
        return rank_ordered_sum([ops.from_bytes(piece, dtype) for piece in pieces])
    return ops.mean_of_wire(pieces, dtype, divisor)


# Gloo sends a gathered array and only then says that it is ready to receive. With more ranks these use different connections; two ranks
# have one connection, on which the later rank's word waits behind its data, so the directions take turns at half the link's rate. Gloo's
# all-reduce uses both directions at once and moves as many bytes. So two ranks add their arrays as 32-bit integers, modulo 2^32, and each
# subtracts its own.
def to_sum(transport: Transport, collective: Collective) -> Array | None:
    """Returns what to sum instead of gathering, as bytes of whole int32; None unless it is an all-gather of known sizes by two ranks."""
    if collective.kind != "allgather" or not any(collective.sizes or ()) or not transport.pair:
        return None
    assert collective.sizes is not None
    lacks = -(-max(collective.sizes) // 4) * 4 - len(collective.array)
    return transport.ops.concat([collective.array, transport.ops.upload(np.zeros(lacks, np.uint8))]) if lacks else collective.array


def by_sum(transport: Transport, collective: Collective, other: Array) -> list[Array]:
    """Returns what both ranks gathered, in rank order. `other`: the sum of what `to_sum` gave, less this rank's own."""
    assert collective.sizes is not None
    pieces = [collective.array, other[: collective.sizes[1 - transport.rank]]]
    return pieces[::-1] if transport.rank else pieces


def rank_ordered_sum(arrays: list[Array]) -> Array:
    """Returns a_0 + a_1 + ..., added in rank order in the arrays' own precision."""
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def uneven_gather(transport: Transport, collective: Collective) -> Carried:
    """Gathers arrays of different lengths on an engine that needs equal ones: lengths that are not known are exchanged first, and shorter
    arrays are padded with zeros."""
    ops, data, sizes = transport.ops, collective.array, collective.sizes
    if sizes is None:
        sizes = yield from exchange_lengths(transport, collective)
    longest = max(sizes)
    padded = data if len(data) == longest else ops.concat([data, ops.upload(np.zeros(longest - len(data), np.uint8))])
    received = yield collective._replace(array=padded, sizes=(longest,) * len(sizes))
    return [piece[:size] for piece, size in zip(received, sizes, strict=True)]


def exchange_lengths(transport: Transport, collective: Collective) -> Generator[Collective, Any, tuple[int, ...]]:
    """Returns the length of every rank's array, by one small all-gather."""
    ops = transport.ops
    own = ops.upload(np.array([len(collective.array)], np.int64).view(np.uint8))
    lengths = yield Collective("allgather", own, collective.label + ".size", sizes=(8,) * transport.size)
    announced = tuple(int(_int64(ops, length)[0]) for length in lengths)
    _check_announced(announced, collective.limits)
    return announced


def _check_announced(sizes: Sequence[int], limits: Sequence[int] | None) -> None:
    """Raises PayloadError if a rank announces more bytes than it can rightly send, before any memory is allocated for them."""
    for rank, (size, limit) in enumerate(zip(sizes, limits or (LONGEST,) * len(sizes), strict=True)):
        if not 0 <= size <= limit:
            raise PayloadError(f"its announced size is {size} bytes; it can be of at most {limit}", rank)


def _int64(ops: Ops, data: Array) -> np.ndarray:
    return np.ascontiguousarray(ops.host(data)).copy().view(np.int64)


def arriving(collective: Collective, rank: int) -> list[int]:
    """Returns how many bytes an all-to-all brings from each rank."""
    assert collective.sizes is not None
    return list(collective.received or (collective.sizes[rank],) * len(collective.sizes))


def cut(data: Array, sizes: Sequence[int]) -> list[Array]:
    """Cuts consecutive pieces of these lengths."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return pieces


def gathered(transport: Transport, collective: Collective, data: Array) -> list[Array]:
    """Cuts the one concatenation that an engine's all-gather returns, by rank: by the known lengths, or by the messages' headers."""
    return cut(data, collective.sizes) if collective.sizes else split_messages(transport.ops, data, transport.size)
