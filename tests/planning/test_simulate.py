"""Compares the simulator with the closed forms, and with an independent, plain event queue that plays every message."""

from __future__ import annotations

import heapq

import pytest

from grace_ext.errors import ParameterError
from grace_ext.planning import cost, simulate
from grace_ext.planning.cost import Link

#: A byte takes a microsecond, and each message a millisecond in addition; inside a node both take a hundredth.
SLOW = Link(8e6, latency=1e-3, overhead=0.25, goodput=1.0)
FAST = Link(8e8, latency=1e-5, goodput=1.0)
CLOSED = {
    "ring": cost.allreduce, "tree": cost.tree_allreduce, "halving-doubling": cost.halving_allreduce, "all-gather": cost.allgather,
    "broadcast": cost.broadcast, "all-to-all": cost.alltoall,
}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 12, 33, 64, 100])
@pytest.mark.parametrize("algorithm", CLOSED)
def test_closed_forms(algorithm, n):
    for nbytes in (0, 12_345):
        assert simulate.seconds(algorithm, n, SLOW, nbytes) == pytest.approx(CLOSED[algorithm](SLOW, n, nbytes), rel=1e-9)


def test_thousands_of_workers():
    """The simulator equals the closed forms for 4096 workers, the largest number in a picture."""
    for algorithm, closed in CLOSED.items():
        assert simulate.seconds(algorithm, 4096, SLOW, 1e6) == pytest.approx(closed(SLOW, 4096, 1e6), rel=1e-6), algorithm


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (4, 4), (3, 8), (5, 3), (1, 4), (6, 1)])
def test_two_levels(nodes, per_node):
    dense, payload, n = 50_000.0, 1_000.0, nodes * per_node
    options = {"per_node": per_node, "inside": FAST, "dense": dense}
    gathered = cost.two_level(FAST, per_node, dense, cost.allgather(SLOW, nodes, payload) - (nodes > 1) * SLOW.overhead, nodes * payload)
    summed = cost.two_level(FAST, per_node, dense, cost.allreduce(SLOW, nodes, payload) - (nodes > 1) * SLOW.overhead, payload)
    assert simulate.seconds("two-level", n, SLOW, payload, **options) == pytest.approx(gathered + SLOW.overhead)
    assert simulate.seconds("two-level sum", n, SLOW, payload, **options) == pytest.approx(summed + SLOW.overhead)


def played(rounds: list[list[tuple[int, int, float]]], n: int, per_node: int) -> float:
    """Returns the seconds of these rounds, by an event queue: a message starts when its sender has all messages of the round before and
    both links are free, the earliest first. All workers of a node share one link to other nodes."""
    ready = [0.0] * n
    out, into = {}, {}
    for messages in rounds:
        arrived = list(ready)
        queue = [(ready[src], order, src, dst, nbytes) for order, (src, dst, nbytes) in enumerate(messages)]
        heapq.heapify(queue)
        while queue:
            begin, order, src, dst, nbytes = heapq.heappop(queue)
            crossing = src // per_node != dst // per_node
            a, b = (("node", src // per_node), ("node", dst // per_node)) if crossing else (("rank", src), ("rank", dst))
            free = max(out.get(a, 0.0), into.get(b, 0.0), begin)
            if free > begin:
                heapq.heappush(queue, (free, order, src, dst, nbytes))
                continue
            link = SLOW if crossing else FAST
            out[a] = into[b] = end = begin + link.latency + nbytes * link.beta
            arrived[dst] = max(arrived[dst], end)
        ready = arrived
    return max(ready)


def by_hand(algorithm: str, n: int, nbytes: float) -> list[list[tuple[int, int, float]]]:
    """Returns the rounds of an algorithm, for n a power of 2."""
    ring = [[(i, (i + 1) % n, nbytes / n) for i in range(n)]] * (2 * (n - 1))
    doubling = [[(i, i + 2**k, nbytes) for i in range(2**k)] for k in range(n.bit_length() - 1)]
    up = [[(b, a, size) for a, b, size in messages] for messages in reversed(doubling)]
    halves = [[(i, i ^ (n >> (k + 1)), nbytes / 2 ** (k + 1)) for i in range(n)] for k in range(n.bit_length() - 1)]
    return {"ring": ring, "tree": up + doubling, "halving-doubling": halves + halves[::-1]}[algorithm]


@pytest.mark.parametrize(("n", "per_node"), [(8, 1), (8, 2), (16, 4), (4, 4)])
@pytest.mark.parametrize("algorithm", ["ring", "tree", "halving-doubling"])
def test_messages_as_an_event_queue_plays_them(algorithm, n, per_node):
    """The simulator takes as long as the event queue, in which the workers of a node wait for each other at its one link."""
    expected = played(by_hand(algorithm, n, 4096.0), n, per_node)
    got = simulate.seconds(algorithm, n, SLOW, 4096.0, per_node=per_node, inside=FAST)
    assert got == pytest.approx(SLOW.overhead + expected)


def test_a_shared_link_is_shared():
    """With halving and doubling, all four workers of a node send to others at once and wait for each other; in a ring only one sends."""
    alone = simulate.seconds("halving-doubling", 16, SLOW, 1e6)
    shared = simulate.seconds("halving-doubling", 16, SLOW, 1e6, per_node=4, inside=FAST)
    assert shared > 2 * alone
    assert simulate.seconds("ring", 16, SLOW, 1e6, per_node=4, inside=FAST) <= simulate.seconds("ring", 16, SLOW, 1e6) * (1 + 1e-9)


def test_bad_input():
    with pytest.raises(ParameterError, match="5 workers do not fill nodes of 2"):
        simulate.seconds("ring", 5, SLOW, 1, per_node=2)
    with pytest.raises(ParameterError, match="no algorithm named 'rings'; known: ring, tree"):
        simulate.seconds("rings", 4, SLOW, 1)
