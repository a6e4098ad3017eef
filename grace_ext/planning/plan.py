"""What compression gains on a network: `grace-ext plan`, and what 'auto' decides by.

Each candidate's step is recorded on this machine (trace.py) and replayed on the network, stated (cost.py) or measured (probe.py), for
n workers. Work and network are those of the candidate's own codecs and collectives; nothing is fitted to exchanges. Where some candidates
were really exchanged, their times stand in place of what was predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import cost
from .cost import Link
from .network import INSIDE, OnLink
from .trace import Network, Timed, Trace, replay

#: A gain below this is within the model's error: dense is recommended, which loses nothing.
WORTH = 1.1
RATES = (1e5, 1e13)


@dataclass(frozen=True)
class Prediction:
    """A candidate's step. Times are milliseconds: see trace.Timed; `gain`: dense step / this step; `pays`: 'below' the rate of the links
    that is `break_even`, bits per second, or 'above' it, 'always' or 'never' (and `break_even` is None), between 100 kbit/s and 10 Tbit/s;
    the dense one's is 'never', that of two levels in a job, whose nodes are not looked at, 'unknown'. `measured_ms`: an exchange that was
    really made, where it was; `uncalibrated_ms`: what was predicted of it, where some were made."""

    spec: str
    nbytes: float
    step_ms: float
    exchange_ms: float
    work_ms: float
    network_ms: float
    gain: float
    break_even: float | None
    pays: str
    measured_ms: float | None = None
    uncalibrated_ms: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """The candidates, dense first; the spec to use, how many times faster its step is than the dense one, and why, in words."""

    rows: tuple[Prediction, ...]
    spec: str
    gain: float
    reason: str


class Model:
    """Traces of candidates for one model's shapes, and what they take on a network. `compute`: seconds of forward and backward pass."""

    def __init__(self, traces: dict[str, Trace], n: int, *, per_node: int = 1, inside: Link = INSIDE, compute: float = 0.0):
        self.traces, self.n, self.per_node, self.inside, self.compute = traces, n, per_node, inside, compute

    def of(self, n: int) -> Model:
        """The same for n workers, of whom a node has no more than there are."""
        return Model(self.traces, n, per_node=min(self.per_node, n), inside=self.inside, compute=self.compute)

    def timed(self, spec: str, network: Network, compute: float | None = None) -> Timed:
        """One step. In two levels: the nodes' exchange on a link each, and before and after it what goes on inside."""
        compute, trace = self.compute if compute is None else compute, self.traces[spec]
        if not (trace.two_level and self.per_node > 1):
            return replay(trace.on(self.n), network, self.n, compute)
        nodes, summed = self.n // self.per_node, cost.allreduce(self.inside, self.per_node, trace.dense)
        if nodes == 1:  # nothing is compressed: it is the dense exchange, and takes as much work
            return replay(next(iter(self.traces.values())).on(self.n), network, self.n, compute)
        between = replay(trace.on(nodes), network.between(), nodes, compute)
        # What the nodes' first workers get of each collective (hierarchy.py): all payloads of a gather, else as much as they gave.
        got = [event.nbytes * (nodes if event.kind == "allgather" else 1) for event in trace.on(nodes) if event.what == "start"]
        inside = summed + sum(cost.broadcast(self.inside, self.per_node, nbytes) for nbytes in got)
        return replace(between, step=between.step + inside, exchange=between.exchange + inside, network=between.network + inside)

    def rows(self, network: Network, link: Link, measured: dict[str, float] | None = None) -> list[Prediction]:
        """One row a candidate. `network` carries them; `link` is varied for the break-even rate; `measured`: seconds of real exchanges."""
        measured, found = measured or {}, {spec: self.timed(spec, network) for spec in self.traces}
        alone = {spec: self.timed(spec, network, 0.0).exchange for spec in self.traces}
        # What overlaps with the backward pass does so whatever else an exchange takes.
        exchanges = {spec: measured.get(spec, alone[spec]) + timed.exchange - alone[spec] for spec, timed in found.items()}
        steps = {spec: self.compute + exchange for spec, exchange in exchanges.items()}
        dense = steps[next(iter(steps))]
        told = {spec: not (measured and trace.two_level) for spec, trace in self.traces.items()}
        even = {spec: self.break_even(spec, link, steps) if told[spec] else (None, "unknown") for spec in steps}
        return [
            Prediction(
                spec, self.traces[spec].nbytes(self.n), 1000 * steps[spec], 1000 * exchanges[spec], 1000 * timed.work, 1000 * timed.network,
                dense / steps[spec], *even[spec], 1000 * measured[spec] if spec in measured else None,
                1000 * alone[spec] if measured else None,
            )
            for spec, timed in found.items()
        ]  # fmt: skip

    def break_even(self, spec: str, link: Link, steps: dict[str, float]) -> tuple[float | None, str]:
        """The rate at which this candidate's step takes as long as the dense one, and where it pays: see Prediction. steps: seconds of the
        steps on `link`, by spec; what they take beside what the model says, they take at every rate."""
        dense = next(iter(self.traces))

        def lead(rate: float) -> float:
            network = OnLink(replace(link, rate=rate), self.per_node, self.inside)
            return self.timed(dense, network).step - self.timed(spec, network).step

        beside = steps[dense] - steps[spec] - lead(link.rate)

        def gained(rate: float) -> float:
            return lead(rate) + beside

        low, high = RATES
        pays = "below" if gained(low) > 0 else "above"
        if spec == dense or (gained(high) > 0) == (pays == "below"):
            return None, "always" if spec != dense and pays == "below" else "never"
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if (gained(middle) > 0) == (pays == "below") else (low, middle)
        return math.sqrt(low * high), pays


def advise(rows: Sequence[Prediction]) -> Recommendation:
    """The fastest candidate, or dense where none is faster by more than the model can tell. The first row is dense."""
    best = min(rows, key=lambda row: row.step_ms)
    if best is rows[0] or best.gain < WORTH:
        return Recommendation(tuple(rows), rows[0].spec, 1.0, f"dense is best here: {_not_taken(rows[1:])}")
    reason = f"a step takes {best.step_ms:.4g} ms against {rows[0].step_ms:.4g} ms dense: x{best.gain:.2f}"
    return Recommendation(tuple(rows), best.spec, best.gain, reason)


def _not_taken(others: Sequence[Prediction]) -> str:
    if not others:
        return "it was compared with nothing else"
    best = min(others, key=lambda row: row.step_ms)
    if best.gain <= 1:
        return f"the best of the others, {best.spec}, is no faster (x{best.gain:.2f})"
    # Rounded down: what is not worth it does not look as if it were.
    gain = math.floor(100 * best.gain) / 100
    return f"the best of the others, {best.spec}, gains x{gain:.2f}, and a gain below x{WORTH:.2f} is within the model's error"
