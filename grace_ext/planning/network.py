"""Computes the time of collectives by cost.py on nodes of several workers that share one link per node."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from . import cost
from .cost import Link
from .trace import Network

#: The default link between workers of one node: the speed of sockets over shared memory.
INSIDE = Link(20e9, 20e-6)


@runtime_checkable
class OfNodes(Protocol):
    """A network of several workers per node, which an exchange in two levels needs."""

    def between(self) -> Network:
        """Returns the network of the nodes' first workers alone."""
        ...


@dataclass(frozen=True)
class OnLink:
    """Gives the seconds of a collective among nodes of `per_node` workers: each node has one `link`, its own workers have `inside`."""

    link: Link
    per_node: int = 1
    inside: Link = INSIDE

    def between(self) -> OnLink:
        """Returns the network of the nodes' first workers alone."""
        return replace(self, per_node=1)

    def __call__(self, kind: str, n: int, nbytes: float) -> float:
        shared = 1 < self.per_node < n
        link = self.inside if 1 < n <= self.per_node else self.link  # workers of one node do not use the link
        if kind == "broadcast":
            return n * (self._broadcast(n, nbytes) if shared else cost.broadcast(link, n, nbytes))
        if kind == "alltoall" and shared and n % self.per_node == 0:
            # A ring uses each node's link once per round; here every worker of a node sends to every worker of the other nodes over it.
            return link.overhead + self.per_node * (n - self.per_node) * link.message(nbytes / n)
        return {"allreduce": cost.allreduce, "allgather": cost.allgather, "alltoall": cost.alltoall}[kind](link, n, nbytes)

    def _broadcast(self, n: int, nbytes: float) -> float:
        """Returns the seconds of a broadcast by one worker. Each round doubles the workers that have it: first inside its node, then across
        the nodes' links, each of which carries up to `per_node` messages one after another."""
        total, have = self.link.overhead, 1
        while have < n:
            crossing = min(have, n - have, self.per_node) if have >= self.per_node else 0
            total += crossing * self.link.message(nbytes) or self.inside.message(nbytes)
            have *= 2
        return total
