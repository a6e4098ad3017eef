"""Executes the effects of N ranks in one process, in lockstep: when all ranks wait for a collective, it is computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import Afterwards, GraceError
from ..parts.field import HALVES, INTEGERS
from ..parts.ops import Ops
from .effects import Collective, Effects, Start, Wait
from .transport import Carried, Transport, cut, rank_ordered_sum


class LockstepTransport(Transport):
    """Stands for one rank among N in this process. It starts nothing: `run_lockstep` executes the collectives of all ranks."""

    splits = True

    def __init__(self, rank: int, size: int, ops: Ops, per_node: int):
        self.rank, self.size, self.ops, self._per_node = rank, size, ops, per_node

    @property
    def node(self) -> str:
        return str(self.rank // self._per_node)

    def carry(self, collective: Collective) -> Carried:
        return (yield collective)  # `execute` knows all kinds

    def start(self, collective: Collective, name: str) -> Any:
        raise GraceError("a simulated rank starts no collectives of its own: the cluster steps it")

    def wait(self, handle: Any) -> Any:
        raise GraceError("a simulated rank waits for no collectives of its own: the cluster steps it")


def run_lockstep(ranks: Sequence[Effects], ops: Ops, per_node: int) -> list[Any]:
    """Runs the effects of all ranks side by side and returns what each rank's generator returned."""
    pending: dict[str, list[Collective]] = {}
    answers: list[Any] = [None] * len(ranks)
    with Afterwards(*(rank.close for rank in ranks)):
        while True:
            effects, returned = [], []
            for rank, answer in zip(ranks, answers, strict=True):
                try:
                    effects.append(rank.send(answer))
                except StopIteration as stop:
                    returned.append(stop.value)
            if returned:
                return returned
            answers = [None] * len(ranks)
            if isinstance(effects[0], Start):
                pending[effects[0].name] = [effect.collective for effect in effects]
            elif isinstance(effects[0], Wait):
                answers = _by_group(pending.pop(effects[0].name), per_node, ops)


def _by_group(collectives: Sequence[Collective], per_node: int, ops: Ops) -> list[Any]:
    """Executes a collective among all ranks, or one in each of the groups that it is for. Returns the result for each rank."""
    level = collectives[0].group  # the first rank is the first of its node: never idle
    if level == "all":
        return execute(collectives, ops)
    every = range(len(collectives))
    groups = [every[i : i + per_node] for i in every[::per_node]] if level == "inside" else [every[::per_node]]
    answers: list[Any] = [None] * len(every)
    for ranks in groups:
        for rank, answer in zip(ranks, execute([collectives[rank] for rank in ranks], ops), strict=True):
            answers[rank] = answer
    return answers


def execute(collectives: Sequence[Collective], ops: Ops) -> list[Any]:
    """Computes one collective of all ranks. Returns the result for each rank; sums are made in rank order."""
    first, arrays = collectives[0], [c.array for c in collectives]
    if first.kind == "allreduce":
        if first.dtype in HALVES:
            arrays = [ops.from_bytes(array, first.dtype) for array in arrays]
        total = rank_ordered_sum(arrays)
        if first.dtype not in INTEGERS:
            total = total / first.divisor
        if first.dtype in HALVES:
            total = ops.to_bytes(total, first.dtype)
        return [total] * len(collectives)
    if first.kind == "alltoall":
        pieces = [cut(c.array, c.sizes or ()) for c in collectives]
        return [list(column) for column in zip(*pieces, strict=True)]
    return [arrays] * len(collectives)  # allgather, broadcast
