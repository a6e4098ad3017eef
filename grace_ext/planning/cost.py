"""Computes the time of an exchange on a network by the alpha-beta model: a message of m bytes takes alpha + m beta seconds.

For n workers, each with a full-duplex link of its own to a switch that is not a bottleneck:

    all-reduce, ring      2 (n-1) (alpha + m/n beta)        m: bytes of the array that is summed
    all-gather, ring        (n-1) (alpha + m beta)          m: bytes of one worker's payload; of the longest, if they differ
    broadcast, tree     ceil(log2 n) (alpha + m beta)       m: bytes of the root's payload
    all-to-all, pairwise    (n-1) (alpha + m/n beta)        m: bytes of one worker's whole buffer

and for comparison all-reduces by a tree, by recursive halving and doubling, and in two levels (see their functions); simulate.py
simulates all of them message by message. Each collective also takes o for what happens before its first message (Horovod's negotiation).
Computation is not included: see `Work`.
Sources: Thakur, Rabenseifner, Gropp 2005 (all four); Patarasu and Yuan 2009 (the ring all-reduce is optimal in bytes). Gloo, which carries
Horovod and torch.distributed on CPUs, uses these algorithms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from ..communicators.base import Communicator
from ..errors import ParameterError, shown

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
#: A number, a prefix, b or bit(s) or B or byte(s), and perhaps 'per second'.
RATE = re.compile(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(?:([kmgtKMGT]?)(b|B|[bB][iI][tT][sS]?|[bB][yY][tT][eE][sS]?)(?:/[sS]|[pP][sS])?)?")
#: The smallest number without a unit that is taken for bits per second, as --json prints them: no link is slower.
BARE = 1e5
#: The part of a full Ethernet frame that is data: 1,448 of 1,514 bytes on the line; the rest are headers of TCP, IP and Ethernet.
GOODPUT = 1448 / 1514


@dataclass(frozen=True)
class Link:
    """Describes one worker's link. rate: bits per second in each direction; latency (alpha): seconds per message besides its bytes,
    software included; overhead (o): seconds per collective before its first message; goodput: the fraction of the rate that payloads
    get."""

    rate: float
    latency: float = 50e-6
    overhead: float = 0.0
    goodput: float = GOODPUT

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ParameterError(f"a link's rate must be a positive number of bits per second, got {shown(self.rate)}")
        if not (0 <= self.latency < math.inf and 0 <= self.overhead < math.inf and 0 < self.goodput <= 1):
            raise ParameterError(f"latency and overhead must be finite, at least 0 seconds, and goodput in (0, 1], got {self}")

    @classmethod
    def of(cls, rate: str, latency: float = 50e-6, overhead: float = 0.0) -> Link:
        """Returns the link with a rate given as text (see `rate_of`). Raises ParameterError."""
        return cls(rate_of(rate), latency, overhead)

    @property
    def beta(self) -> float:
        """Seconds per byte of payload."""
        return 8 / (self.rate * self.goodput)

    def message(self, nbytes: float) -> float:
        """Returns the seconds of one message: alpha + m beta."""
        return self.latency + nbytes * self.beta


def rate_of(text: str) -> float:
    """Returns the bits per second of a rate such as '100mbit', '2.5 Gbit/s', '1gb' or '125 MB/s': b is a bit, B a byte of 8. Raises
    ParameterError."""
    found = RATE.fullmatch(text.strip())
    rate = 0.0
    if found:
        number, prefix, unit = float(found[1]), (found[2] or "").lower(), found[3]
        rate = number * PREFIXES[prefix] * (8 if unit == "B" or (unit or "").lower().startswith("byte") else 1)
        if unit is None and number < BARE:
            rate = 0.0
    if not 0 < rate < math.inf:
        raise ParameterError(
            f"{text!r} is no rate: give a number above 0 with a unit, such as 100mbit, 2.5gbit, '1 Gbit/s', 1gb or '125 MB/s' (b: bits, B: "
            "bytes)"
        )
    return rate


def rate_text(rate: float) -> str:
    """Returns a rate in bits per second as text, which `rate_of` reads."""
    size, unit = next(((size, unit) for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if rate >= 0.9995 * size), (1e3, "k"))
    return f"{rate / size:.3g} {unit}bit/s"


def allreduce(link: Link, n: int, nbytes: float) -> float:
    """Returns the seconds to sum arrays of `nbytes` over n workers by a reduce-scatter and an all-gather, each in a ring:
    o + 2 (n-1) (alpha + m/n beta)."""
    return _collective(link, n, 2 * (n - 1), nbytes, n)


def allgather(link: Link, n: int, nbytes: float) -> float:
    """Returns the seconds until n workers have everyone's payload of `nbytes`: o + (n-1) (alpha + m beta). In a ring every round carries
    all payloads, so it takes as long as the longest: pass that if they differ."""
    return _collective(link, n, n - 1, nbytes)


def broadcast(link: Link, n: int, nbytes: float) -> float:
    """Returns the seconds until n workers have the root's `nbytes`: o + ceil(log2 n) (alpha + m beta). Each round doubles the workers that
    have it."""
    return _collective(link, n, (n - 1).bit_length(), nbytes)


def alltoall(link: Link, n: int, nbytes: float) -> float:
    """Returns the seconds until each of n workers has its 1/n of everyone's buffer of `nbytes`, in pairwise rounds:
    o + (n-1) (alpha + m/n beta)."""
    return _collective(link, n, n - 1, nbytes, n)


def tree_allreduce(link: Link, n: int, nbytes: float) -> float:
    """Returns the seconds to sum by a binomial reduction and a broadcast, in few messages of whole arrays:
    o + 2 ceil(log2 n) (alpha + m beta)."""
    return _collective(link, n, 2 * (n - 1).bit_length(), nbytes)


def halving_allreduce(link: Link, n: int, nbytes: float) -> float:
    """Returns the seconds to sum by recursive halving and doubling: o + 2 log2 p alpha + 2 (p-1)/p m beta, where p is the largest power of
    2 up to n; and 2 (alpha + m beta) more if p is not n."""
    if n < 2:
        return _collective(link, n, 0, nbytes)
    core = 1 << (n.bit_length() - 1)
    folded = 2 * link.message(nbytes) if core < n else 0.0
    return link.overhead + 2 * (core.bit_length() - 1) * link.latency + 2 * (core - 1) / core * nbytes * link.beta + folded


def two_level(inside: Link, per_node: int, dense: float, between: float, result: float) -> float:
    """Returns the seconds of an exchange in two levels: a ring all-reduce of `dense` bytes inside each node, `between` seconds between the
    nodes' first workers, and a broadcast of the result, of `result` bytes, from these to the others."""
    return allreduce(inside, per_node, dense) + between + broadcast(inside, per_node, result)


def _collective(link: Link, n: int, messages: int, nbytes: float, pieces: int = 1) -> float:
    """Returns the seconds of `messages` messages in a row, each with one of `pieces` equal pieces of `nbytes`; 0 for one worker."""
    if n < 1:
        raise ParameterError(f"the number of workers must be at least 1, got {n}")
    return 0.0 if n == 1 else link.overhead + messages * link.message(nbytes / pieces)


def network(communicator: Communicator, link: Link, n: int, payload: float, dense: float) -> float:
    """Returns the seconds of this communicator's collectives, one after another, for payloads of `payload` bytes of tensors of `dense`
    bytes (float32). The communicator lists its collectives; 'broadcast' stands for n, one by each worker in turn."""
    seconds = {"allreduce": allreduce, "allgather": allgather, "alltoall": alltoall, "broadcast": lambda *args: n * broadcast(*args)}
    return sum(seconds[kind](link, n, nbytes) for kind, nbytes in communicator.collectives(n, payload, dense))


@dataclass(frozen=True)
class Work:
    """Holds the seconds that a worker computes in one exchange. encode: once, with error feedback; decode: per payload that it decodes."""

    encode: float
    decode: float

    def seconds(self, communicator: Communicator, n: int) -> float:
        """Returns encode + k decode, for the k payloads that each of n workers decodes with this communicator."""
        return self.encode + communicator.decodes(n) * self.decode


def exchange(communicator: Communicator, link: Link, n: int, payload: float, dense: float, work: Work) -> float:
    """Returns the seconds of one exchange that overlaps with nothing: work + network."""
    return work.seconds(communicator, n) + network(communicator, link, n, payload, dense)


def crossing(compressed: Callable[[int], float], plain: Callable[[int], float], limit: int = 1024) -> int | None:
    """Returns the smallest number of workers, from 2 to `limit`, at which `compressed` is not faster than `plain`; None if it always is."""
    return next((n for n in range(2, limit + 1) if compressed(n) >= plain(n)), None)


def gather_limit(payload: float, dense: float) -> float:
    """Returns the number of workers above which an all-gather of payloads moves more bytes than a dense all-reduce: (n-1) m = 2 (n-1)/n S
    at n = 2 S / m. Latency and work are not included."""
    return 2 * dense / payload
