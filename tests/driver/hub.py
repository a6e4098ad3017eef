"""Simulates an engine in memory: runs all ranks' drivers in one thread, interleaves their effects at random, matches collectives by name.

It asserts what real engines need: the same starts in the same order on every rank, no name started twice, no deadlock (it says which ranks
hang), arrays unchanged until the wait, and only the kinds of collectives that the engine has.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grace_ext.arrays.compiled import host_ops
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.driver.driver import Start
from grace_ext.exchange.transport import Transport, cut, gathered
from grace_ext.parts.field import HALVES

OPS = host_ops(NumpyOps)


class Native(Transport):
    """An engine that has everything: uneven gathers, broadcasts of any size, 16-bit sums."""

    gathers_uneven = True

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.ops = rank, size, OPS

    def carry(self, collective):
        return (yield collective)

    def check(self, collective) -> None:
        """Raises AssertionError if this engine has no such collective."""

    def start(self, collective, name):
        raise AssertionError("the hub performs effects itself")

    wait = start

    def received(self, collective, result):
        """Returns what `wait` returns on this engine."""
        return result


class Poor(Native):
    """An engine with float32 and float64 sums, even gathers, sized broadcasts and all-to-all; everything else must be lowered to these."""

    gathers_uneven = False

    def carry(self, collective):
        return (yield from Transport.carry(self, collective))

    def check(self, collective):
        if collective.kind == "allreduce":
            assert collective.dtype in ("float32", "float64") and collective.array.dtype.name == collective.dtype
        else:
            assert collective.array.dtype == np.uint8 and collective.sizes is not None and len(collective.sizes) == self.size
        if collective.kind == "allgather":
            assert set(collective.sizes) == {len(collective.array)}
        if collective.kind == "broadcast":
            assert collective.sizes[self.rank] == len(collective.array)
        if collective.kind == "alltoall":
            assert sum(collective.sizes) == len(collective.array)


class Concatenating(Poor):
    """Like Horovod, gathers arrays of any lengths, but returns one concatenation without saying where each begins."""

    gathers_uneven = True

    def check(self, collective):
        if collective.kind == "allgather" and collective.sizes is None:
            return
        if collective.kind == "allgather":
            assert collective.sizes[self.rank] == len(collective.array)
        else:
            super().check(collective)

    def received(self, collective, result):
        return gathered(self, collective, np.concatenate(result)) if collective.kind == "allgather" else result


def perform_collective(collectives: Sequence[Any], rank: int) -> Any:
    """Returns the result of a collective for one rank, computed independently of the package."""
    first, arrays = collectives[0], [c.array for c in collectives]
    assert len({(c.kind, c.label, c.divisor, c.dtype) for c in collectives}) == 1, "ranks paired different collectives"
    if first.kind == "allreduce":
        assert len({a.shape for a in arrays}) == 1
        if first.dtype in HALVES:  # arrays hold wire bytes
            arrays = [OPS.from_bytes(array, first.dtype) for array in arrays]
        total = arrays[0].copy()
        for array in arrays[1:]:
            total += array
        if first.dtype.startswith("int"):
            assert first.divisor == 1 and abs(total).max() < 2 ** (int(first.dtype[3:]) - 1), "an integer sum overflows"
            return total
        total /= total.dtype.type(first.divisor)
        if first.dtype in HALVES:
            total = OPS.to_bytes(total, first.dtype)
        return total
    if first.kind in ("allgather", "broadcast"):
        return [a.copy() for a in arrays]
    assert first.kind == "alltoall"
    return [cut(c.array, c.sizes)[rank].copy() for c in collectives]


@dataclass
class Hub:
    """Runs one generator of effects per rank. `starts` records every rank's starts."""

    transports: Sequence[Native]
    seed: int = 0
    starts: list[list[str]] = field(default_factory=list)

    def run(self, programs: Sequence[Generator]) -> list[Any]:
        """Runs the programs. Returns each one's result, or the exception that ended it."""
        size, rng = len(programs), random.Random(self.seed)
        self.starts = [[] for _ in range(size)]
        results: list[Any] = [None] * size
        under_way: list[dict[str, Any]] = [{} for _ in range(size)]
        posted: dict[tuple[str, int], dict[int, Any]] = {}
        serial: list[dict[str, int]] = [{} for _ in range(size)]
        blocked: dict[int, str] = {}
        alive, answers = set(range(size)), [None] * size
        while alive:
            ready = [r for r in sorted(alive) if r not in blocked or len(posted[under_way[r][blocked[r]]]) == size]
            assert ready, f"deadlock: {blocked}"
            rank = rng.choice(ready)
            if rank in blocked:
                key = under_way[rank].pop(blocked.pop(rank))
                collectives = [posted[key][r][0] for r in range(size)]
                for collective, before in posted[key].values():
                    assert collective.array.tobytes() == before, "an array changed between start and wait"
                own = collectives[rank]
                answers[rank] = self.transports[rank].received(own, perform_collective(collectives, rank))
            try:
                effect = programs[rank].send(answers[rank])
            except StopIteration as stop:
                results[rank] = stop.value
                alive.discard(rank)
                continue
            except Exception as error:
                results[rank] = error
                alive.discard(rank)
                continue
            answers[rank] = None
            if not isinstance(effect, Start):
                assert effect.name in under_way[rank], "a wait without a start"
                blocked[rank] = effect.name
                continue
            self.transports[rank].check(effect.collective)
            assert effect.name not in under_way[rank], "a name started twice"
            number = serial[rank][effect.name] = serial[rank].get(effect.name, -1) + 1
            under_way[rank][effect.name] = (effect.name, number)
            posted.setdefault((effect.name, number), {})[rank] = (effect.collective, effect.collective.array.tobytes())
            self.starts[rank].append(effect.name)
        return results


def step(driver, gradients, order) -> Generator:
    """Makes one step on one rank, with gradients arriving in this order."""
    for name in order:
        yield from driver.put(name, gradients[name])
    return (yield from driver.finish())
