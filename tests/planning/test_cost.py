"""Compares the cost formulas with numbers worked out by hand, single simulated messages, and the bytes that communicators declare."""

from __future__ import annotations

import math

import pytest

import grace_ext
from grace_ext.errors import ParameterError
from grace_ext.planning.cost import (
    Link,
    Work,
    allgather,
    allreduce,
    alltoall,
    broadcast,
    crossing,
    exchange,
    gather_limit,
    network,
    rate_of,
    rate_text,
)

#: A byte takes a microsecond, and each message a millisecond in addition.
SLOW = Link(8e6, latency=1e-3, goodput=1.0)


def test_by_hand():
    assert SLOW.beta == pytest.approx(1e-6)
    assert allreduce(SLOW, 4, 4000) == pytest.approx(6 * (1e-3 + 1e-3))
    assert allgather(SLOW, 4, 4000) == pytest.approx(3 * (1e-3 + 4e-3))
    assert broadcast(SLOW, 5, 4000) == pytest.approx(3 * 5e-3)
    assert alltoall(SLOW, 4, 4000) == pytest.approx(3 * 2e-3)
    # ResNet-50's gradients at 1 Gbit/s on two hosts: 102,228,128 bytes at 125 MB/s less headers
    assert allreduce(Link.of("1gbit", latency=0), 2, 102_228_128) == pytest.approx(0.8178 * 1514 / 1448, rel=1e-3)


def test_overhead_counts_once_a_collective_and_one_worker_sends_nothing():
    with_overhead = Link(8e6, latency=1e-3, overhead=0.5, goodput=1.0)
    for collective in (allreduce, allgather, broadcast, alltoall):
        assert collective(with_overhead, 3, 900) == pytest.approx(0.5 + collective(SLOW, 3, 900))
        assert collective(with_overhead, 1, 900) == 0


def ring(n: int, rounds: int, nbytes: float) -> float:
    """Simulates a ring message by message: a worker forwards what it got in the round before, once its own last message has arrived."""
    ready, free = [0.0] * n, [0.0] * n
    for _ in range(rounds):
        arrived = [0.0] * n
        for rank in range(n):
            start = max(ready[rank], free[rank])
            free[rank] = start + SLOW.latency + nbytes * SLOW.beta
            arrived[(rank + 1) % n] = free[rank]
        ready = arrived
    return max(ready)


def tree(n: int, nbytes: float) -> float:
    """Simulates a broadcast: in each round every worker that has the data sends it to one that has not."""
    have, now = 1, 0.0
    while have < n:
        have, now = min(n, 2 * have), now + SLOW.latency + nbytes * SLOW.beta
    return now


def pairwise(n: int, nbytes: float) -> float:
    """Simulates an all-to-all: in round i rank r sends a piece to r + i; a rank sends one message and receives one at a time."""
    sending, receiving = [0.0] * n, [0.0] * n
    for distance in range(1, n):
        for rank in range(n):
            to = (rank + distance) % n
            end = max(sending[rank], receiving[to]) + SLOW.latency + nbytes / n * SLOW.beta
            sending[rank] = receiving[to] = end
    return max(sending)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 33])
def test_against_messages_simulated_one_by_one(n):
    m = 12_345.0
    assert allgather(SLOW, n, m) == pytest.approx(ring(n, n - 1, m))
    assert allreduce(SLOW, n, m) == pytest.approx(ring(n, 2 * (n - 1), m / n))
    assert broadcast(SLOW, n, m) == pytest.approx(tree(n, m))
    assert alltoall(SLOW, n, m) == pytest.approx(pairwise(n, m))


@pytest.mark.parametrize("name", [name for name in grace_ext.communicators.names() if name != "broadcast"])
@pytest.mark.parametrize("n", [2, 4, 100])
def test_the_bytes_are_those_that_communicators_say(name, n):
    """The formulas count the bytes that communicators declare (except broadcast: its root sends more than the average)."""
    communicator, bytes_alone = grace_ext.communicators.get(name)(), Link(8e6, latency=0, goodput=1.0)
    assert network(communicator, bytes_alone, n, 5000, 80_000) == pytest.approx(1e-6 * communicator.bytes_sent(n, 5000, 80_000))


def test_a_communicator_of_another_package():
    class Twice(grace_ext.communicators.get("allgather")):
        name = "twice"

        def collectives(self, n, payload, dense):
            return [("allgather", payload), ("allreduce", payload)]

    gather, total = (grace_ext.communicators.get(name)() for name in ("allgather", "allreduce"))
    assert network(Twice(), SLOW, 4, 1000, 0) == pytest.approx(network(gather, SLOW, 4, 1000, 0) + network(total, SLOW, 4, 1000, 0))
    assert Twice().bytes_sent(4, 1000, 0) == gather.bytes_sent(4, 1000, 0) + total.bytes_sent(4, 1000, 0)


def test_an_exchange_decodes_every_payload_of_a_gather_and_one_of_a_reduction():
    work = Work(encode=1.0, decode=0.1)
    by_name = {name: grace_ext.communicators.get(name)() for name in ("allgather", "allreduce")}
    assert exchange(by_name["allgather"], SLOW, 10, 0, 0, work) == pytest.approx(2.0 + 9e-3)
    assert exchange(by_name["allreduce"], SLOW, 10, 0, 0, work) == pytest.approx(1.1 + 18e-3)


def test_where_gathering_stops_paying():
    """Without latency and work, the limit is n = 2 S / m: if m is 1/20 of S, gathering pays below 40 workers."""
    free = Link(8e6, latency=0, goodput=1.0)
    gather = lambda n: allgather(free, n, 1000)  # noqa: E731
    dense = lambda n: allreduce(free, n, 20_000)  # noqa: E731
    assert gather_limit(1000, 20_000) == 40
    assert crossing(gather, dense) in (40, 41)  # equal at 40, up to rounding
    assert crossing(gather, dense, limit=39) is None
    assert crossing(lambda n: math.inf, dense) == 2


def test_rates_in_words():
    """Rates are read as people, data sheets and `plan` itself write them: b is a bit, B a byte."""
    assert Link.of("100mbit").rate == 1e8 and Link.of("2.5 Gbit").rate == 2.5e9 and Link.of("9600bit").rate == 9600
    gigabit = ("1gbit", "1 Gbit/s", "1gb", "1Gb", "1 Gb/s", "1Gbps", "1000 Mbits", "125MB/s", "125 mB", "0.125 GBps", "125 MByte/s",
               "125000 kbytes", " 1e3 mbit ", "1000000000.0", "1e9")  # fmt: skip
    assert {text: Link.of(text).rate for text in gigabit} == dict.fromkeys(gigabit, 1e9)
    for wrong in ("fast", "-1gbit", "", "0mbit", "1", "1000", "1 g", "1 Gbit/m", "gbit", "1..2gbit", "1e400bit", "1 xbit", "1,5gbit"):
        with pytest.raises(ParameterError, match="is no rate: give a number above 0 with a unit, such as 100mbit"):
            Link.of(wrong)
    for wrong in ({"rate": math.nan}, {"rate": 1, "latency": -1}, {"rate": 1, "goodput": 0}, {"rate": math.inf}):
        with pytest.raises(ParameterError):
            Link(**wrong)
    with pytest.raises(ParameterError):
        allreduce(SLOW, 0, 1)


@pytest.mark.parametrize("rate", [1.0, 9600, 1e5, 999_499, 999_999, 1e6, 2.5e9, 1e9, 9.999e11, 1e13])
def test_a_printed_rate_can_be_given(rate):
    assert rate_of(rate_text(rate)) == pytest.approx(rate, rel=5.1e-3) and "e" not in rate_text(rate)
