"""What a job's own network takes: collectives of a few sizes and exchanges of a few candidates, timed on the transport that carries them.

Everything here is collective: all ranks of the transport do it alike, and get the same answer (the slowest rank's, for each time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..driver.driver import Effects, Start, Wait
from ..exchange.effects import Collective
from ..exchange.transport import Transport
from .cost import GOODPUT, Link

KINDS = ("allreduce", "allgather", "alltoall")
SIZES = (64, 1 << 16, 1 << 19, 1 << 22)
#: Of what a collective takes before its first message: what a message takes at least, besides its bytes.
LEAST = 0.01
#: (kind, ranks, bytes of one rank's buffer, seconds)
Point = tuple[str, int, int, float]


def fitted(points: Sequence[Point]) -> Link:
    """The link of least relative error over plain collectives, by cost.py's formulas: over the smallest and the largest of each kind. What
    is between these may pass in the burst that a limited link grants after a pause, and says little of either latency or rate. None of
    its figures is negative: one that would be is 0. Where all points are of one number of ranks, and messages seem to take next to nothing
    beside a collective, what it takes to start is taken for theirs: one number hardly tells these apart, and with thousands of workers no
    link is as fast as with two."""
    messages: dict[str, Callable[[int], int]] = {"allreduce": lambda n: 2 * (n - 1)}
    sizes = {(kind, n): [size for its, ranks, size, _ in points if (its, ranks) == (kind, n)] for kind, n, *_ in points}
    points = [p for p in points if p[2] in (min(sizes[p[:2]]), max(sizes[p[:2]]))]
    rows = []
    for kind, n, size, _ in points:
        count = messages.get(kind, lambda n: n - 1)(n)
        rows.append([1, count, count * size / (1 if kind == "allgather" else n)])
    scaled = np.array(rows) / np.array([seconds for *_, seconds in points])[:, None]
    overhead, latency, beta = _nonnegative(scaled)
    if latency < LEAST * overhead and len({ranks for _, ranks, *_ in points}) == 1:
        latency, beta = _nonnegative(scaled[:, 1:])
        overhead = 0.0
    return Link(8 / (max(beta, 1e-15) * GOODPUT), latency, overhead)


def _nonnegative(columns: np.ndarray) -> list[float]:
    """The coefficients of the columns' sum that is closest to 1 in every row, those that would be negative left out."""
    used = list(range(columns.shape[1]))
    while True:
        solved = np.linalg.lstsq(columns[:, used], np.ones(len(columns)), rcond=None)[0]
        if (solved >= 0).all():
            found = dict(zip(used, solved, strict=True))
            return [float(found.get(i, 0.0)) for i in range(columns.shape[1])]
        used.pop(int(np.argmin(solved * np.linalg.norm(columns[:, used], axis=0))))


@dataclass(frozen=True)
class MeasuredNetwork:
    """Collectives of these ranks by what was measured of them: between two sizes on the line through them, beyond the largest along the
    last such line. KeyError for what was not measured, another number of ranks too. `link` is what fits all of it."""

    points: tuple[Point, ...]
    link: Link

    def __call__(self, kind: str, n: int, nbytes: float) -> float:
        kind = "allgather" if kind == "broadcast" else kind
        known = sorted((size, seconds) for its, ranks, size, seconds in self.points if its == kind and ranks == n)
        if len(known) < 2:
            raise KeyError(kind)
        sizes, seconds = zip(*known, strict=True)
        if nbytes <= sizes[-1]:
            return float(np.interp(nbytes, sizes, seconds))
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        return seconds[-1] + slope * (nbytes - sizes[-1])


class Probe:
    """The ranks of one transport, timed together. Its methods are generators of the driver's effects, which `driver.perform` executes, or
    whatever runs a driver: a policy may probe at the end of a step."""

    def __init__(self, transport: Transport, prefix: str = "grace/probe"):
        self.transport, self.ops, self.n, self._prefix = transport, transport.ops, transport.size, prefix

    def largest(self, values: Sequence[float]) -> Effects:
        """Each value's maximum over the ranks."""
        own = self.ops.upload(np.array(values, np.float64).view(np.uint8).copy())
        told = yield from self._run(Collective("allgather", own, "", sizes=(len(own),) * self.n), f"{self._prefix}/say/{len(own)}")
        every = [np.ascontiguousarray(self.ops.host(data)).copy().view(np.float64) for data in told]
        return [float(x) for x in np.max(every, axis=0)]

    def collectives(self, sizes: Sequence[int] = SIZES, repeats: int = 3) -> Effects:
        """A MeasuredNetwork: each kind at each size, once to warm up and then `repeats` times: the median."""
        seen = []
        for kind in KINDS:
            for size in sizes:
                seen.append((kind, size, (yield from self._timed(kind, size, repeats))))
        slowest = yield from self.largest([seconds for *_, seconds in seen])
        points = tuple((kind, self.n, size, seconds) for (kind, size, _), seconds in zip(seen, slowest, strict=True))
        return MeasuredNetwork(points, fitted(points))

    def _timed(self, kind: str, size: int, repeats: int) -> Effects:
        seconds = []
        for _ in range(repeats + 1):
            collective = self._sample(kind, size)
            yield from self.barrier()
            begin = time.perf_counter()
            yield from self._run(collective, f"{self._prefix}/{kind}/{size}")
            seconds.append(time.perf_counter() - begin)
        return float(np.median(seconds[1:]))

    def _sample(self, kind: str, size: int) -> Collective:
        if kind == "allreduce":
            return Collective(kind, self.ops.zeros(size // 4), "", 1, dtype="float32")
        data = self.ops.upload(np.zeros(size, np.uint8))
        if kind == "allgather":
            return Collective(kind, data, "", sizes=(size,) * self.n)
        bounds = [size * rank // self.n for rank in range(self.n + 1)]
        return Collective(kind, data, "", sizes=tuple(b - a for a, b in zip(bounds, bounds[1:], strict=False)))

    def barrier(self) -> Effects:
        """No rank goes on before all are here."""
        yield from self._run(Collective("allreduce", self.ops.zeros(1), "", 1, dtype="float32"), f"{self._prefix}/barrier")

    def _run(self, collective: Collective, name: str) -> Effects:
        yield Start(name, collective)
        return (yield Wait(name))
