"""Exchanges in two levels: gradients are summed uncompressed inside each node, and exchanged compressed between the nodes.

All ranks of a node do the same things in the same order, so the deadlock argument of driver.py holds unchanged: a collective between nodes
starts on the first rank of each node, while the node's other ranks yield an idle one in its place; then its result is broadcast inside.
No rank runs ahead of its node, and all ranks of a node decode and remember the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from ..parts.ops import Array, Ops
from ..parts.tensor import StepInfo
from .bucket import BucketExchange, exchange_bucket
from .effects import Collective
from .fusing import Carry
from .lockstep import execute
from .tensor import Job
from .transport import Carried, Transport, arriving, cut


class TwoLevel:
    """Places one rank among the nodes. nodes: by rank, the name of its node; nodes are numbered in the order of their first ranks."""

    def __init__(self, rank: int, nodes: Sequence[str], ops: Ops):
        names = list(dict.fromkeys(nodes))
        self.members = [[r for r, node in enumerate(nodes) if node == name] for name in names]
        self.node, self.nodes, self.ranks, self.ops = names.index(nodes[rank]), len(names), len(nodes), ops
        self.leads = self.members[self.node][0] == rank
        self._between = _Between(self.node, self.nodes, ops)

    @property
    def groups(self) -> list[list[int]]:
        """The ranks of each node, and last the first rank of every node."""
        return [*self.members, [members[0] for members in self.members]]

    def exchange(self, jobs: Sequence[Job], info: StepInfo, digest: int, carry: Carry) -> BucketExchange:
        """Exchanges this rank's gradients, as exchange_bucket does. `carry` is used if every rank has a node of its own."""
        if self.nodes == self.ranks:
            return (yield from exchange_bucket(self.ops, jobs, info, digest, carry))
        # A sum over all ranks has divisor 1 on both levels; a mean is divided by the nodes between them, and by the rest inside.
        divisor = self.nodes if info.divisor != 1 else 1
        summed = yield from self._inside(jobs, info.divisor / divisor)
        own = [job._replace(grad=grad) for job, grad in zip(jobs, summed, strict=True)]
        info = dataclasses.replace(info, rank=self.node, size=self.nodes, divisor=divisor)
        return (yield from exchange_bucket(self.ops, own, info, digest, self.carry if self.nodes > 1 else self._answer))

    def _inside(self, jobs: Sequence[Job], ranks: float) -> Generator[list[Collective], list[Any], list[Array]]:
        """Sums the jobs' gradients inside the node and divides by `ranks`, the mean number of ranks per node. One collective for each
        precision."""
        ops, dtypes = self.ops, ["float64" if job.spec.dtype == "float64" else "float32" for job in jobs]
        used = sorted(set(dtypes))
        wholes = [ops.concat([job.grad for job, its in zip(jobs, dtypes, strict=True) if its == dtype]) for dtype in used]
        totals = yield [
            Collective("allreduce", whole, f"inside.{dtype}", dtype=dtype, group="inside")
            for dtype, whole in zip(used, wholes, strict=True)
        ]
        pieces = {}
        for dtype, total in zip(used, totals, strict=True):
            sizes = [job.spec.size for job, its in zip(jobs, dtypes, strict=True) if its == dtype]
            pieces[dtype] = iter(cut(ops.cast(total / ranks, dtype), sizes))
        return [next(pieces[dtype]) for dtype in dtypes]

    def carry(self, collective: Collective) -> Carried:
        """Carries a collective of the nodes: between their first ranks, and its result to the nodes' other ranks."""
        steps, answer = self._between.carry(collective), None
        while True:
            try:
                basic = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            if self.leads:
                result = yield basic._replace(group="between")
            else:
                result = yield basic._replace(group="idle", array=basic.array[:0])
            answer = yield from self._shared(basic, result)

    def _answer(self, collective: Collective) -> Carried:
        """Answers a collective of a single node, which asks nobody."""
        return execute([collective], self.ops)[0]
        yield

    def _shared(self, basic: Collective, result: Any) -> Carried:
        """Broadcasts what the node's first rank got to all ranks of the node."""
        ops, label = self.ops, basic.label + ".inside"
        if basic.kind == "allreduce":
            sizes = [basic.nbytes]
            data = ops.to_bytes(result, basic.dtype) if self.leads else None
        else:
            sizes = arriving(basic, self.node) if basic.kind == "alltoall" else list(basic.sizes or ())
            data = ops.concat(result) if self.leads else None
        data = ops.zeros(0, "uint8") if data is None else data
        lengths = (sum(sizes), *(0,) * (len(self.members[self.node]) - 1))
        told = yield Collective("broadcast", data, label, sizes=lengths, group="inside")
        whole = told[0]
        return ops.from_bytes(whole, basic.dtype) if basic.kind == "allreduce" else cut(whole, sizes)


class _Between(Transport):
    """Stands for the nodes as ranks: it says how collectives between nodes are carried, and starts nothing."""

    def __init__(self, rank: int, size: int, ops: Ops):
        self.rank, self.size, self.ops = rank, size, ops

    def start(self, collective: Collective, name: str) -> Any:
        raise NotImplementedError("the transport of the nodes' first ranks starts it")

    def wait(self, handle: Any) -> Any:
        raise NotImplementedError("the transport of the nodes' first ranks waits for it")
