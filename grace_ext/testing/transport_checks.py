"""Checks everything that a driver asks of a transport. `check_transport` runs them in the processes of a real job."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import ml_dtypes
import numpy as np

from ..exchange.effects import Collective, Effects, Start, Wait
from ..exchange.message import message
from ..exchange.perform import at_once, perform
from ..exchange.transport import Transport
from ..parts.field import HALVES, INTEGERS


def check_transport(transport: Transport) -> None:
    """Checks everything that a driver asks of a transport. Every rank of a job calls it; raises AssertionError if a result is wrong."""
    for check in CHECKS:
        check(transport)


# --- the arrays of each rank, which every other rank can compute, too ---------------------------------------------------------
def floats(rank: int, dtype: str, count: int = 37) -> np.ndarray:
    """Returns multiples of 1/8, whose sums are exact."""
    return (np.random.default_rng(rank).integers(-64, 64, count) / 8).astype(dtype)


def data(rank: int, length: int) -> np.ndarray:
    return np.random.default_rng([rank, length]).integers(0, 256, length).astype(np.uint8)


def run(transport: Transport, wanted: Collective, name: str) -> Any:
    return perform(at_once(transport, wanted, name), transport, {})


def host(transport: Transport, array: Any) -> np.ndarray:
    return np.array(transport.ops.host(array))


# --- the checks ---------------------------------------------------------------------------------------------------------
def knows_its_place(transport: Transport) -> None:
    """Ranks count from 0, and the name of the node is text."""
    assert 0 <= transport.rank < transport.size
    assert isinstance(transport.node, str) and transport.node
    assert transport.among("all") is transport


def sums_floats(transport: Transport) -> None:
    """All-reduces give the mean or the sum of float32 and float64 arrays, of one element and of many."""
    n, ops = transport.size, transport.ops
    for dtype in ("float32", "float64"):
        for count in (1, 37, 5000):
            total = sum(floats(rank, dtype, count).astype(np.float64) for rank in range(n))
            for divisor in (1, n):
                own = ops.upload(floats(transport.rank, dtype, count))
                found = run(transport, Collective("allreduce", own, "sum", divisor, dtype=dtype), f"check/{dtype}/{count}/{divisor}")
                assert np.allclose(host(transport, found), total / divisor, rtol=1e-6), (dtype, count, divisor)


def sums_halves_and_integers(transport: Transport) -> None:
    """All-reduces round 16-bit floats once, from a float32 sum, and add integers exactly."""
    n, ops = transport.size, transport.ops
    for dtype in HALVES:
        kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
        every = [floats(rank, "float32").astype(kind) for rank in range(n)]
        own = ops.upload(every[transport.rank].view(np.uint8).copy())
        found = run(transport, Collective("allreduce", own, "half", n, dtype=dtype), f"check/{dtype}")
        mean = (sum(x.astype(np.float32) for x in every) / np.float32(n)).astype(kind)
        assert host(transport, found).tobytes() == mean.tobytes(), dtype
    for dtype in INTEGERS:
        every = [np.random.default_rng(rank).integers(-40 // n, 40 // n + 1, 37) for rank in range(n)]
        own = ops.upload(every[transport.rank].astype(np.int64))
        found = run(transport, Collective("allreduce", own, "integers", 1, dtype=dtype), f"check/{dtype}")
        assert np.array_equal(host(transport, found), sum(every)), dtype


def gathers(transport: Transport) -> None:
    """All-gathers and broadcasts deliver arrays of equal and of different known lengths (0 included), and messages of unknown length."""
    n, ops = transport.size, transport.ops
    for kind in ("allgather", "broadcast"):
        for what, lengths in (("equal", [24] * n), ("uneven", [7 * rank for rank in range(n)])):
            own = ops.upload(data(transport.rank, lengths[transport.rank]))
            wanted = Collective(kind, own, what, sizes=tuple(lengths))
            found = run(transport, wanted, f"check/{kind}/{what}")
            sent = [data(rank, length).tobytes() for rank, length in enumerate(lengths)]
            assert [host(transport, x).tobytes() for x in found] == sent, (kind, what)
        every = [message(ops, [ops.upload(data(rank, 5 + 11 * rank))], digest=1, step=2, finite=True) for rank in range(n)]
        limits = (1000,) * n
        found = run(transport, Collective(kind, every[transport.rank], "messages", limits=limits), f"check/{kind}/messages")
        assert [host(transport, x).tobytes() for x in found] == [host(transport, x).tobytes() for x in every], kind


def exchanges_pieces(transport: Transport) -> None:
    """All-to-alls deliver pieces of the same sizes on all ranks, of different known sizes, and messages of unknown length."""
    n, rank, ops = transport.size, transport.rank, transport.ops
    same = tuple(3 + 2 * to for to in range(n))
    pieces = [[data(10 * a + b, same[b]) for b in range(n)] for a in range(n)]
    found = run(transport, Collective("alltoall", ops.upload(np.concatenate(pieces[rank])), "same", sizes=same), "check/alltoall/same")
    assert [host(transport, x).tobytes() for x in found] == [pieces[a][rank].tobytes() for a in range(n)]
    messages = [
        [host(transport, message(ops, [ops.upload(data(10 * a + b, a + 4 * b))], digest=1, step=2, finite=True)) for b in range(n)]
        for a in range(n)
    ]
    for received, name in ((tuple(len(messages[a][rank]) for a in range(n)), "known"), ((), "unknown")):
        own = ops.upload(np.concatenate(messages[rank]))
        sizes = tuple(len(piece) for piece in messages[rank])
        wanted = Collective("alltoall", own, name, sizes=sizes, received=received, limits=(1000,) * n)
        found = run(transport, wanted, f"check/alltoall/{name}")
        assert [host(transport, x).tobytes() for x in found] == [messages[a][rank].tobytes() for a in range(n)], name


def keeps_several_under_way(transport: Transport) -> None:
    """Several collectives can be under way at once and are waited for in the order of their starts; names can be used again."""
    n, ops = transport.size, transport.ops

    def effects() -> Effects:
        for turn in range(3):
            for i in range(4):
                own = ops.upload(floats(transport.rank + turn, "float32", 100 + i))
                yield Start(f"check/several/{i}", Collective("allreduce", own, f"several.{i}", 1, dtype="float32"))
            for i in range(4):
                found = yield Wait(f"check/several/{i}")
                total = sum(floats(rank + turn, "float32", 100 + i) for rank in range(n))
                assert np.allclose(host(transport, found), total, rtol=1e-6), (turn, i)

    perform(effects(), transport, {})


def makes_groups(transport: Transport) -> None:
    """If the transport `splits`, collectives run inside each of two nodes, and between the first ranks of the nodes."""
    n = transport.size
    if not transport.splits or n < 3:
        return
    nodes = [list(range(n // 2)), list(range(n // 2, n))]
    transport.split([*nodes, [nodes[0][0], nodes[1][0]]])
    mine = next(ranks for ranks in nodes if transport.rank in ranks)
    for group, ranks in (("inside", mine), ("between", [nodes[0][0], nodes[1][0]])):
        among = transport.among(group)
        assert (among is not None) == (transport.rank in ranks), group
        if among is not None:
            assert (among.size, among.rank) == (len(ranks), ranks.index(transport.rank))
            own = transport.ops.upload(floats(transport.rank, "float32"))
            wanted = Collective("allreduce", own, group, 1, dtype="float32")
            found = perform(_in_group(among, wanted, f"check/group/{group}"), among, {})
            assert np.allclose(host(transport, found), sum(floats(rank, "float32") for rank in ranks), rtol=1e-6), group


def _in_group(among: Transport, wanted: Collective, name: str) -> Generator[Any, Any, Any]:
    return (yield from at_once(among, wanted, name))


#: In this order: the last one involves all ranks, so that no rank leaves the job while others are still in a group.
CHECKS = (
    knows_its_place, sums_floats, sums_halves_and_integers, gathers, exchanges_pieces, makes_groups, keeps_several_under_way,
)  # fmt: skip
