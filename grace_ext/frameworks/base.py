"""What a transport is, and how one that lacks a collective carries it by those that it has."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CollectiveError, IncompatiblePartsError, PayloadError, UnsupportedError
from ..exchange import Collective
from ..parts.field import HALVES, INTEGERS, ITEMSIZE
from ..parts.ops import Array, Ops
from ..parts.payload import split_messages

if TYPE_CHECKING:
    from ..composition import Grace

Carried = Generator[Collective, Any, Any]
#: Hyperparameters that only optimizers with moments or scales of their own have, as torch and Keras call them.
ADAPTIVE = ("betas", "eps", "etas", "rho", "beta_1", "beta_2_decay", "epsilon", "learning_rate_power", "history_size")
#: Those that change a model by more than the gradients it is given, or by less: what CSER undoes is just what these made.
BESIDE_GRADIENTS = ("weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "gradient_accumulation_steps", "use_ema", "lambd")
#: The most bytes of a message whose parts do not say how long it can be: what ranks tell each other in an agreement.
LONGEST = 2**28


def rate_of(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The learning rate of an optimizer's parameter groups, None where there is none; NaN where they differ, which parts that use it
    refuse."""
    rates = {float(group["lr"]) for group in groups if "lr" in group}
    if len(rates) > 1:
        return float("nan")
    return rates.pop() if rates else None


class Transport(ABC):
    """The asynchronous collectives of one engine among `size` ranks, for the arrays of `ops`."""

    rank: int
    size: int
    ops: Ops
    #: The engine's all-gather takes arrays of different lengths as they are; else lengths are exchanged and arrays padded.
    gathers_uneven: bool = False
    #: The engine's all-to-all finds out by itself how much arrives; else every rank's sizes are exchanged.
    scatters_uneven: bool = False
    #: What is raised where the engine could not end a collective.
    failure: type[CollectiveError] = CollectiveError
    #: It has groups of ranks: `group`, for exchanges in two levels.
    splits: bool = False
    _groups: Mapping[str, Transport | None] = MappingProxyType({})

    @property
    def node(self) -> str:
        """A name that the ranks on this machine share: GRACE_EXT_NODE, torchrun's number of the node, or the host's name."""
        return os.environ.get("GRACE_EXT_NODE") or os.environ.get("GROUP_RANK") or socket.gethostname()

    def group(self, ranks: Sequence[int]) -> Transport | None:
        """A transport among these of its ranks, None on the others; all ranks call it alike, for each group in turn."""
        raise UnsupportedError(f"{type(self).__name__} has no groups of ranks")

    def split(self, groups: Sequence[Sequence[int]]) -> None:
        """Makes the groups of an exchange in two levels: the last is that between the nodes, one of the others is this rank's node."""
        *inside, between = [self.group(ranks) for ranks in groups]
        self._groups = {"inside": next(t for t in inside if t is not None), "between": between}

    def among(self, group: str) -> Transport | None:
        """The transport for collectives of a group (see Collective); None for those that this rank has no part in."""
        return self if group == "all" else self._groups.get(group)

    @property
    def pair(self) -> bool:
        """There are two ranks: what one has of a sum, the other can subtract (see `by_sum`)."""
        return self.size == 2

    @abstractmethod
    def start(self, collective: Collective, name: str) -> Any:
        """Starts it without blocking; returns a handle. The array belongs to the transport until `wait` has returned."""

    @abstractmethod
    def wait(self, handle: Any) -> Any:
        """Blocks; returns the result (see Collective)."""

    def carry(self, collective: Collective) -> Carried:
        """Yields collectives that this engine has, one at a time, and returns the result of the one that was asked for."""
        if collective.kind == "allreduce" and collective.dtype in (*HALVES, *INTEGERS):
            # Engines' own 16-bit sums round at every addition, and are slow on a CPU; not all have sums of all integers.
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
            sizes = yield from _lengths(self, collective)
            return (yield collective._replace(sizes=sizes))
        return (yield collective)


def ordered_sum(transport: Transport, collective: Collective) -> Carried:
    """A 16-bit or integer all-reduce: every rank gets its share of all arrays, adds it in rank order (in float32 or int64), divides,
    rounds once, and the shares are gathered. The same bits on every engine and for every number of ranks. Of two ranks each gets all of
    the other's, which is as many bytes, in one round."""
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
    """The ranks' pieces of a 16-bit or integer all-reduce, added in rank order: of integers int64[], else the mean in its wire form."""
    if dtype in INTEGERS:
        return rank_ordered_sum([ops.from_bytes(piece, dtype) for piece in pieces])
    return ops.mean_of_wire(pieces, dtype, divisor)


# Gloo sends a gathered array and only then says that it is ready to receive. With more ranks these go over different connections; two
# ranks have one, where the later rank's word waits behind its data, and the directions take turns: half the link's rate. Its all-reduce
# uses both at once, and moves as many bytes. So two ranks add their arrays as 32-bit integers, modulo 2^32, and each subtracts its own.
def to_sum(transport: Transport, collective: Collective) -> Array | None:
    """What to sum, bytes of whole int32, for an all-gather of known sizes among two ranks. None for any other collective."""
    if collective.kind != "allgather" or not any(collective.sizes or ()) or not transport.pair:
        return None
    lacks = -(-max(collective.sizes) // 4) * 4 - len(collective.array)
    return transport.ops.concat([collective.array, transport.ops.upload(np.zeros(lacks, np.uint8))]) if lacks else collective.array


def by_sum(transport: Transport, collective: Collective, other: Array) -> list[Array]:
    """What both ranks gathered, in rank order; `other` is the sum of what `to_sum` gave less this rank's own."""
    assert collective.sizes is not None
    pieces = [collective.array, other[: collective.sizes[1 - transport.rank]]]
    return pieces[::-1] if transport.rank else pieces


def check_optimizer(grace: Grace, name: str, settings: Mapping[str, Any]) -> None:
    """Raises IncompatiblePartsError where a memory is the momentum of the training, or needs plain SGD (cser), and this optimizer, given
    its class's name and its hyperparameters by name, has a momentum of its own or is an adaptive one."""
    memory = next((memory for memory in grace.memories if memory.is_momentum or memory.diverges), None)
    if memory is None:
        return
    adaptive = [key for key in ADAPTIVE if key in settings]
    beside = [key for key in BESIDE_GRADIENTS if settings.get(key)] if memory.diverges else []
    if beside:
        raise IncompatiblePartsError(
            f"memory {memory} takes errors back out of the model that plain SGD put there, and the optimizer {name} has "
            f"{', '.join(f'{key}={settings[key]}' for key in beside)}: the ranks' models would not come together. Use plain SGD (a decay "
            "can be part of the loss, and gradients can be clipped before step()), or memory 'residual'"
        )
    if settings.get("momentum") or adaptive:
        has = f"adapts its steps ({', '.join(adaptive)})" if adaptive else f"has momentum={settings['momentum']} of its own"
        why = "is the momentum of the training", "momentum would be applied twice"
        if memory.diverges:
            why = "takes errors back out of the model that plain SGD put there", "the ranks' models would not come together"
        raise IncompatiblePartsError(
            f"memory {memory} {why[0]}, and the optimizer {name} {has}: {why[1]}. Use SGD with momentum=0, or memory 'residual'"
        )


def rank_ordered_sum(arrays: list[Array]) -> Array:
    """a_0 + a_1 + ..., added in rank order in the arrays' own precision."""
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def uneven_gather(transport: Transport, collective: Collective) -> Carried:
    """An all-gather of arrays of different lengths for an engine that needs equal ones: lengths are exchanged first where they are not
    known already, and the shorter arrays are padded with zeros."""
    ops, data, sizes = transport.ops, collective.array, collective.sizes
    if sizes is None:
        sizes = yield from _lengths(transport, collective)
    longest = max(sizes)
    padded = data if len(data) == longest else ops.concat([data, ops.upload(np.zeros(longest - len(data), np.uint8))])
    received = yield collective._replace(array=padded, sizes=(longest,) * len(sizes))
    return [piece[:size] for piece, size in zip(received, sizes, strict=True)]


def _lengths(transport: Transport, collective: Collective) -> Carried:
    """Every rank's array length, by one small all-gather."""
    ops = transport.ops
    own = ops.upload(np.array([len(collective.array)], np.int64).view(np.uint8))
    lengths = yield Collective("allgather", own, collective.label + ".size", sizes=(8,) * transport.size)
    announced = tuple(int(_int64(ops, length)[0]) for length in lengths)
    _check_announced(announced, collective.limits)
    return announced


def _check_announced(sizes: Sequence[int], limits: Sequence[int] | None) -> None:
    """Raises PayloadError, before any memory is taken for it, where a rank announces more than it can rightly send."""
    for rank, (size, limit) in enumerate(zip(sizes, limits or (LONGEST,) * len(sizes), strict=True)):
        if not 0 <= size <= limit:
            raise PayloadError(f"its announced size is {size} bytes; it can be of at most {limit}", rank)


def _int64(ops: Ops, data: Array) -> np.ndarray:
    return np.ascontiguousarray(ops.host(data)).copy().view(np.int64)


def arriving(collective: Collective, rank: int) -> list[int]:
    """How many bytes an all-to-all brings from each rank."""
    assert collective.sizes is not None
    return list(collective.received or (collective.sizes[rank],) * len(collective.sizes))


def cut(data: Array, sizes: Sequence[int]) -> list[Array]:
    """Consecutive pieces of these lengths."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return pieces


def gathered(transport: Transport, collective: Collective, data: Array) -> list[Array]:
    """By rank, from the one concatenation that an engine's all-gather returns: lengths are known, or read from the messages' headers."""
    return cut(data, collective.sizes) if collective.sizes else split_messages(transport.ops, data, transport.size)
