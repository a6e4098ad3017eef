"""The network of a job as cost.py describes it: nodes of several workers, one link per node."""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import cost
from .cost import Link

#: Between workers of one node, where nothing is said: what sockets over shared memory carry.
INSIDE = Link(20e9, 20e-6)


@dataclass(frozen=True)
class OnLink:
    """The network that cost.py describes: nodes of `per_node` workers, each node with one link, and `inside` between its own workers."""

    link: Link
    per_node: int = 1
    inside: Link = INSIDE

    def between(self) -> OnLink:
        """That of the nodes' first workers."""
        return replace(self, per_node=1)

    def __call__(self, kind: str, n: int, nbytes: float) -> float:
        shared = 1 < self.per_node < n
        link = self.inside if 1 < n <= self.per_node else self.link  # of one node alone nothing crosses a link
        if kind == "broadcast":
            return n * (self._broadcast(n, nbytes) if shared else cost.broadcast(link, n, nbytes))
        if kind == "alltoall" and shared and n % self.per_node == 0:
            # A ring crosses from node to node once; here every worker of a node sends to every worker of the others.
            return link.overhead + self.per_node * (n - self.per_node) * link.message(nbytes / n)
        return {"allreduce": cost.allreduce, "allgather": cost.allgather, "alltoall": cost.alltoall}[kind](link, n, nbytes)

    def _broadcast(self, n: int, nbytes: float) -> float:
        """From one worker: those who have it double, first in its node, then so many at a time on each node's link."""
        total, have = self.link.overhead, 1
        while have < n:
            crossing = min(have, n - have, self.per_node) if have >= self.per_node else 0
            total += crossing * self.link.message(nbytes) or self.inside.message(nbytes)
            have *= 2
        return total
