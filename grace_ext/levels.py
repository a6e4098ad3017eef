"""Exchanges in two levels: which ranks share a node, and a bucket's exchange that is dense inside the nodes and compressed between them.

All ranks of a node do the same things in the same order, so driver.py's argument holds as it is: a collective between nodes is started
on the first rank of each, and on the others an idle one stands in its place; then its result is broadcast inside. No rank runs ahead
of its node, and what all of a node decode and remember is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from .exchange import Collective, Job, Outcome, exchange_bucket
from .frameworks.base import Transport, arriving, cut
from .parts.ops import Array, Ops
from .parts.tensor import StepInfo


class Levels:
    """One rank's place. nodes: by rank, the name of the node it is on; nodes are numbered in the order of their first ranks."""

    def __init__(self, rank: int, nodes: Sequence[str], ops: Ops):
        names = list(dict.fromkeys(nodes))
        self.members = [[r for r, node in enumerate(nodes) if node == name] for name in names]
        self.node, self.nodes, self.ranks, self.ops = names.index(nodes[rank]), len(names), len(nodes), ops
        self.leads = self.members[self.node][0] == rank
        self._between = _Between(self.node, self.nodes, ops)

    @property
    def groups(self) -> list[list[int]]:
        """The ranks of each node, and at last the first of every node."""
        return [*self.members, [members[0] for members in self.members]]

    def exchange(self, jobs: Sequence[Job], info: StepInfo, digest: int, carry: Any) -> Generator[Any, Any, tuple[list[Outcome], bool]]:
        """As exchange_bucket, for this rank's gradients; `carry` is for a job whose ranks are all on nodes of their own."""
        if self.nodes == self.ranks:
            return (yield from exchange_bucket(self.ops, jobs, info, digest, carry))
        # A sum over all ranks has divisor 1, and so have those inside and between; else both divide by the nodes, and this by the rest.
        divisor = self.nodes if info.divisor != 1 else 1
        summed = yield from self._inside(jobs, info.divisor / divisor)
        own = [job._replace(grad=grad) for job, grad in zip(jobs, summed, strict=True)]
        if self.nodes == 1:
            finite = all(self.ops.all_finite(job.grad) for job in own)
            return [Outcome(job.grad, job.state) for job in own], finite
        info = dataclasses.replace(info, rank=self.node, size=self.nodes, divisor=divisor)
        return (yield from exchange_bucket(self.ops, own, info, digest, self.carry))

    def _inside(self, jobs: Sequence[Job], ranks: float) -> Generator[Any, Any, list[Array]]:
        """The jobs' gradients, added up inside the node, by the mean number of ranks a node: one collective for each precision."""
        ops, dtypes = self.ops, ["float64" if job.spec.dtype == "float64" else "float32" for job in jobs]
        used = sorted(set(dtypes))
        wholes = [ops.concat([job.grad for job, its in zip(jobs, dtypes, strict=True) if its == dtype]) for dtype in used]
        asked = [Collective("allreduce", whole, f"inside.{d}", dtype=d, group="inside") for d, whole in zip(used, wholes, strict=True)]
        totals = yield asked
        pieces = {}
        for dtype, total in zip(used, totals, strict=True):
            sizes = [job.spec.size for job, its in zip(jobs, dtypes, strict=True) if its == dtype]
            pieces[dtype] = iter(cut(ops.cast(total / ranks, dtype), sizes))
        return [next(pieces[dtype]) for dtype in dtypes]

    def carry(self, collective: Collective) -> Generator[Collective, Any, Any]:
        """A collective of the nodes: between their first ranks, and its result to the others."""
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

    def _shared(self, basic: Collective, result: Any) -> Generator[Collective, Any, Any]:
        """What the node's first rank got, on all ranks of the node."""
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
    """The nodes as ranks: says what carries what between them, and starts nothing."""

    def __init__(self, rank: int, size: int, ops: Ops):
        self.rank, self.size, self.ops = rank, size, ops

    def start(self, collective: Collective, name: str) -> Any:
        raise NotImplementedError("the transport of the first ranks does")

    wait = start  # type: ignore[assignment]
