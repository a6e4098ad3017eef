"""Measures a job's own network: times collectives of a few sizes on the transport that carries the training's exchanges.

Everything here is collective: all ranks of the transport do the same and get the same answer (each time is the slowest rank's).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..exchange.effects import Collective, Effects, Start, Wait
from ..exchange.transport import Transport
from .cost import GOODPUT, Link

KINDS = ("allreduce", "allgather", "alltoall")
SIZES = (64, 1 << 16, 1 << 19, 1 << 22)
#: The smallest latency that is believed, as a fraction of a collective's overhead (see `fitted`).
LEAST = 0.01
#: (kind, ranks, bytes of one rank's buffer, seconds)
Point = tuple[str, int, int, float]


def fitted(points: Sequence[Point]) -> Link:
    """Fits a link to timed collectives by cost.py's formulas, with the least relative error, and none of its figures negative.

    It uses the smallest and the largest size of each kind only: sizes between these may pass in the burst that a limited link allows after
    a pause, and tell little about latency or rate. If all points have one number of ranks, and the fitted latency is below LEAST times the
    overhead, the overhead is set to 0 and the latency fitted without it: one number of ranks hardly tells the two apart, and a link
    without latency would be too good for thousands of workers."""
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
    """Returns the coefficients for which the weighted sum of the columns is closest to 1 in every row; none is negative."""
    used = list(range(columns.shape[1]))
    while True:
        solved = np.linalg.lstsq(columns[:, used], np.ones(len(columns)), rcond=None)[0]
        if (solved >= 0).all():
            found = dict(zip(used, solved, strict=True))
            return [float(found.get(i, 0.0)) for i in range(columns.shape[1])]
        used.pop(int(np.argmin(solved * np.linalg.norm(columns[:, used], axis=0))))


@dataclass(frozen=True)
class MeasuredNetwork:
    """Gives the seconds of a collective among these ranks by interpolation between the measured sizes; beyond the largest, by extrapolation
    from the last two. Raises KeyError for a kind or a number of ranks that was not measured. `link` is the fit to all points."""

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
    """Times the ranks of one transport together. Its methods are generators of effects, which exchange/perform.py executes, or whatever
    runs a driver: a policy may probe at the end of a step."""

    def __init__(self, transport: Transport, prefix: str = "grace/probe"):
        self.transport, self.ops, self.n, self._prefix = transport, transport.ops, transport.size, prefix

    def largest(self, values: Sequence[float]) -> Effects:
        """Returns each value's maximum over the ranks."""
        own = self.ops.upload(np.array(values, np.float64).view(np.uint8).copy())
        told = yield from self._run(Collective("allgather", own, "", sizes=(len(own),) * self.n), f"{self._prefix}/say/{len(own)}")
        every = [np.ascontiguousarray(self.ops.host(data)).copy().view(np.float64) for data in told]
        return [float(x) for x in np.max(every, axis=0)]

    def collectives(self, sizes: Sequence[int] = SIZES, repeats: int = 3) -> Effects:
        """Returns a MeasuredNetwork. Each kind is timed at each size: once to warm up, then `repeats` times, of which the median counts."""
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
        """Waits until all ranks have come to it."""
        yield from self._run(Collective("allreduce", self.ops.zeros(1), "", 1, dtype="float32"), f"{self._prefix}/barrier")

    def _run(self, collective: Collective, name: str) -> Effects:
        yield Start(name, collective)
        return (yield Wait(name))
