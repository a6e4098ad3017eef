"""Simulates collectives message by message, for thousands of workers: a check of the closed forms in cost.py.

A message of m bytes takes alpha + m beta seconds. It starts when its sender has its data and the links of the sender and the receiver are
free: a link carries one message in each direction at a time. Several workers of one node share one link to the switch, and have a faster
one (`inside`) to each other. Algorithms run in several groups at once: each row of `groups` is one.

    ring         all-reduce: 2 (n-1) rounds of n-ths; all-gather: n-1 rounds of whole payloads
    tree         binomial reduction to one worker, binomial broadcast from it
    halving      all-reduce by recursive halving and doubling; if n is not a power of 2, the extra workers first send theirs to a partner
    two-level    all-reduce inside the nodes, an exchange between their first workers, its result broadcast inside

Sources: Thakur, Rabenseifner, Gropp 2005; Patarasu and Yuan 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..errors import ParameterError
from .cost import Link

Groups = np.ndarray


class Machines:
    """Keeps, for n workers, `per_node` on each node, when each has its data and when each link is free. Raises ParameterError."""

    def __init__(self, n: int, link: Link, per_node: int = 1, inside: Link | None = None):
        if n < 1 or per_node < 1 or n % per_node:
            raise ParameterError(f"{n} workers do not fill nodes of {per_node}: give a multiple of {per_node}, at least {per_node}")
        self.link, self.inside, self.count = link, inside or link, n // per_node
        self.workers = np.arange(n).reshape(self.count, per_node)
        self._node = np.arange(n) // per_node
        #: By worker: when it has the data of its next message. By link (the nodes', then the workers'): when it is free.
        self.ready, self._out, self._in = np.zeros(n), np.zeros(self.count + n), np.zeros(self.count + n)

    def rounds(self, src: np.ndarray, dst: np.ndarray, nbytes: float, times: int = 1) -> None:
        """Plays `times` rounds of the same messages. A worker sends in a round once it has the messages of the rounds before."""
        src, dst = src.ravel(), dst.ravel()
        crossing = self._node[src] != self._node[dst]
        out, into = (np.where(crossing, self._node[end], self.count + end) for end in (src, dst))
        seconds = np.where(crossing, self.link.message(nbytes), self.inside.message(nbytes))
        turns = list(_turns(out, into))
        for _ in range(times):
            arrived = self.ready.copy()
            for turn in turns:
                begin = np.maximum(self.ready[src[turn]], np.maximum(self._out[out[turn]], self._in[into[turn]]))
                self._out[out[turn]] = self._in[into[turn]] = end = begin + seconds[turn]
                np.maximum.at(arrived, dst[turn], end)
            self.ready = arrived


def _turns(out: np.ndarray, into: np.ndarray) -> Any:
    """Yields the messages in sets that use no link twice: those of one link go one after another, in their order."""
    left = np.arange(len(out))
    while len(left):
        first = np.zeros(len(left), bool)
        first[np.unique(out[left], return_index=True)[1]] = True
        second = np.zeros(len(left), bool)
        second[np.flatnonzero(first)[np.unique(into[left[first]], return_index=True)[1]]] = True
        yield left[second]
        left = left[~second]


def ring(m: Machines, groups: Groups, rounds: int, nbytes: float) -> None:
    """Every worker sends to the next, `rounds` times."""
    if groups.shape[1] > 1:
        m.rounds(groups, np.roll(groups, -1, axis=1), nbytes, rounds)


def ring_allreduce(m: Machines, groups: Groups, nbytes: float) -> None:
    n = groups.shape[1]
    ring(m, groups, 2 * (n - 1), nbytes / n)


def ring_allgather(m: Machines, groups: Groups, nbytes: float) -> None:
    ring(m, groups, groups.shape[1] - 1, nbytes)


def broadcast(m: Machines, groups: Groups, nbytes: float) -> None:
    """Broadcasts from each group's first worker. Each round doubles the workers that have it."""
    for have, more in _doubling(groups.shape[1]):
        m.rounds(groups[:, :more], groups[:, have : have + more], nbytes)


def tree_allreduce(m: Machines, groups: Groups, nbytes: float) -> None:
    for have, more in reversed(_doubling(groups.shape[1])):
        m.rounds(groups[:, have : have + more], groups[:, :more], nbytes)
    broadcast(m, groups, nbytes)


def _doubling(n: int) -> list[tuple[int, int]]:
    """Returns (how many have it, how many get it) by round."""
    return [(2**i, min(2**i, n - 2**i)) for i in range((n - 1).bit_length())]


def halving_allreduce(m: Machines, groups: Groups, nbytes: float) -> None:
    """Partners at growing distances exchange halves, quarters, ... of what they sum, and then the sums, backwards."""
    n = groups.shape[1]
    core = 1 << (n.bit_length() - 1)
    extra = n - core
    if extra:
        m.rounds(groups[:, core:], groups[:, :extra], nbytes)
    places, steps = np.arange(core), core.bit_length() - 1
    for step in (*range(steps), *reversed(range(steps))):
        m.rounds(groups[:, places], groups[:, places ^ (core >> (step + 1))], nbytes / 2 ** (step + 1))
    if extra:
        m.rounds(groups[:, :extra], groups[:, core:], nbytes)


def alltoall(m: Machines, groups: Groups, nbytes: float) -> None:
    """In round i each worker sends a piece to the i-th worker after it; it has all its pieces from the beginning."""
    n = groups.shape[1]
    start = done = m.ready
    for distance in range(1, n):
        m.ready = start
        m.rounds(groups, np.roll(groups, -distance, axis=1), nbytes / n)
        done = np.maximum(done, m.ready)
    m.ready = done


def two_level(m: Machines, groups: Groups, dense: float, payload: float, gathers: bool = True) -> None:
    """Sums gradients of `dense` bytes inside the nodes, gathers (or sums) payloads between their first workers, and broadcasts the result
    inside. `groups` are the nodes."""
    ring_allreduce(m, groups, dense)
    leaders = groups[:, :1].T
    (ring_allgather if gathers else ring_allreduce)(m, leaders, payload)
    broadcast(m, groups, payload * (leaders.shape[1] if gathers else 1))


#: The algorithms on one array of all workers, by name.
FLAT: dict[str, Callable[[Machines, Groups, float], None]] = {
    "ring": ring_allreduce, "tree": tree_allreduce, "halving-doubling": halving_allreduce, "all-gather": ring_allgather,
    "broadcast": broadcast, "all-to-all": alltoall,
}  # fmt: skip


def seconds(
    algorithm: str, n: int, link: Link, nbytes: float, *, per_node: int = 1, inside: Link | None = None, dense: float = 0.0
) -> float:
    """Returns when the last of n workers is done, the link's overhead included (0 for one worker, which sends nothing).

    algorithm: one of FLAT, with `nbytes` as in cost.py; or, for gradients of `dense` bytes, 'two-level' (payloads of `nbytes` are gathered
    between the nodes) or 'two-level sum' (they are summed). Raises ParameterError."""
    m = Machines(n, link, per_node, inside)
    if algorithm in FLAT:
        FLAT[algorithm](m, m.workers.reshape(1, -1), nbytes)
    elif algorithm in ("two-level", "two-level sum"):
        partial(two_level, gathers=algorithm == "two-level")(m, m.workers, dense, nbytes)
    else:
        raise ParameterError(f"no algorithm named {algorithm!r}; known: {', '.join([*FLAT, 'two-level', 'two-level sum'])}")
    return float(m.ready.max()) + (link.overhead if n > 1 else 0.0)
