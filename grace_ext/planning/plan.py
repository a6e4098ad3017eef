"""Predicts what compression gains on a network, for `grace-ext plan` and policy 'auto'.

Each candidate's step is recorded on this machine (trace.py) and replayed on the network, given (cost.py) or measured (probe.py), for
n workers. Work and network are those of the candidate's own codecs and collectives; nothing is fitted to exchanges. If some candidates
were really exchanged, the measured times replace the predicted ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import cost
from .cost import Link
from .host import HostCopies, received, started
from .network import INSIDE, OfNodes, OnLink
from .trace import Network, Timed, Trace, replay

#: A gain below this is within the model's error: then dense is recommended, which loses nothing.
WORTH = 1.1
#: Break-even rates are looked for in this range, bits per second.
RATES = (1e5, 1e13)


@dataclass(frozen=True)
class Prediction:
    """Holds the predicted step of one candidate. Times are in milliseconds, see trace.Timed. `gain`: dense step / this step.

    `pays`: whether it is faster than dense 'below' or 'above' the link rate `break_even`, bits per second, or 'always' or 'never' between
      100 kbit/s and 10 Tbit/s (then `break_even` is None). It is 'never' for dense, and 'unknown' for two levels in a measured job, whose
      nodes are not looked at.
    `measured_ms`: the time of a real exchange, if one was made, and `uncalibrated_ms` the predicted one, if any was made; both are without
      copies between GPU and host."""

    spec: str
    nbytes: float
    step_ms: float
    exchange_ms: float
    work_ms: float
    network_ms: float
    copy_ms: float
    gain: float
    break_even: float | None
    pays: str
    measured_ms: float | None = None
    uncalibrated_ms: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """Holds the candidates, dense first; the spec to use; how many times faster its step is than the dense one; and why, in words."""

    rows: tuple[Prediction, ...]
    spec: str
    gain: float
    reason: str


class Model:
    """Computes the times of the traced candidates of one model on a network. `compute`: seconds of the forward and backward pass. `host`:
    copies between GPU and host, None if there are none."""

    def __init__(
        self,
        traces: dict[str, Trace],
        n: int,
        *,
        per_node: int = 1,
        inside: Link = INSIDE,
        compute: float = 0.0,
        host: HostCopies | None = None,
    ):
        self.traces, self.n, self.per_node, self.inside, self.compute, self.host = traces, n, per_node, inside, compute, host
        self.dense = next(iter(traces), "")

    def of(self, n: int) -> Model:
        """Returns the same for n workers; a node has at most n."""
        return Model(self.traces, n, per_node=min(self.per_node, n), inside=self.inside, compute=self.compute, host=self.host)

    def timed(self, spec: str, network: Network, compute: float | None = None) -> Timed:
        """Returns the times of one step. In two levels: of the exchange between the nodes, and of those inside before and after it."""
        timed = self._without_copies(spec, network, self.compute if compute is None else compute)
        copies = self._copies(spec)
        return replace(timed, step=timed.step + copies, exchange=timed.exchange + copies, copies=copies)

    def _nodes(self, spec: str) -> int:
        """Returns the number of nodes between which this candidate is exchanged in two levels; 0 if it is in one."""
        return self.n // self.per_node if self.traces[spec].two_level and self.per_node > 1 else 0

    def _without_copies(self, spec: str, network: Network, compute: float) -> Timed:
        trace, nodes = self.traces[spec], self._nodes(spec)
        if not nodes:
            return replay(trace.on(self.n), network, self.n, compute)
        if nodes == 1:  # nothing is compressed: this is the dense exchange, with the same work
            return replay(self.traces[self.dense].on(self.n), network, self.n, compute)
        assert isinstance(network, OfNodes), "several workers per node need a network of nodes"
        between = replay(trace.on(nodes), network.between(), nodes, compute)
        inside = cost.allreduce(self.inside, self.per_node, trace.dense)
        # What the nodes' first workers received is handed on (hierarchy.py).
        inside += sum(cost.broadcast(self.inside, self.per_node, received(event, nodes)) for event in started(trace.on(nodes)))
        return replace(between, step=between.step + inside, exchange=between.exchange + inside, network=between.network + inside)

    def _copies(self, spec: str) -> float:
        """Returns the seconds of copies between GPU and host in one step. In two levels: those of a node's first worker."""
        if self.host is None:
            return 0.0
        if self.host.copied == "gradients":
            return 0.0 if spec == self.dense else self.host.seconds(2 * self.host.nbytes)
        trace, nodes = self.traces[self.dense if self._nodes(spec) == 1 else spec], self._nodes(spec)
        among = nodes if nodes > 1 else self.n
        events = started(trace.on(among))
        nbytes = sum(event.nbytes + received(event, among) for event in events)
        if nodes > 1:  # the sum inside, and what is handed on
            nbytes += 2 * trace.dense + sum(received(event, nodes) for event in events)
        return self.host.seconds(nbytes)

    def rows(self, network: Network, link: Link, measured: dict[str, float] | None = None) -> list[Prediction]:
        """Returns one row per candidate on `network`. `link` is varied for the break-even rate; `measured`: seconds of real exchanges."""
        measured, found = measured or {}, {spec: self.timed(spec, network) for spec in self.traces}
        alone = {spec: its.exchange - its.copies for spec in self.traces for its in [self.timed(spec, network, 0.0)]}
        # The overlap with the backward pass is taken to be the predicted one for measured exchanges, too.
        exchanges = {spec: measured.get(spec, alone[spec]) + timed.exchange - alone[spec] for spec, timed in found.items()}
        steps = {spec: self.compute + exchange for spec, exchange in exchanges.items()}
        dense = steps[self.dense]
        told = {spec: not (measured and trace.two_level) for spec, trace in self.traces.items()}
        even = {spec: self.break_even(spec, link, steps) if told[spec] else (None, "unknown") for spec in steps}
        return [
            Prediction(
                spec, self.traces[spec].nbytes(self.n), 1000 * steps[spec], 1000 * exchanges[spec], 1000 * timed.work, 1000 * timed.network,
                1000 * timed.copies, dense / steps[spec], *even[spec], 1000 * measured[spec] if spec in measured else None,
                1000 * alone[spec] if measured else None,
            )
            for spec, timed in found.items()
        ]  # fmt: skip

    def break_even(self, spec: str, link: Link, steps: dict[str, float]) -> tuple[float | None, str]:
        """Returns the link rate at which this candidate's step takes as long as the dense one, and where it pays (see Prediction). steps:
        seconds of the steps on `link`, by spec; their differences from the predicted seconds are taken to be the same at every rate."""

        def lead(rate: float) -> float:
            network = OnLink(replace(link, rate=rate), self.per_node, self.inside)
            return self.timed(self.dense, network).step - self.timed(spec, network).step

        beside = steps[self.dense] - steps[spec] - lead(link.rate)

        def gained(rate: float) -> float:
            return lead(rate) + beside

        low, high = RATES
        pays = "below" if gained(low) > 0 else "above"
        if spec == self.dense or (gained(high) > 0) == (pays == "below"):
            return None, "always" if spec != self.dense and pays == "below" else "never"
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if (gained(middle) > 0) == (pays == "below") else (low, middle)
        return math.sqrt(low * high), pays


def advise(rows: Sequence[Prediction]) -> Recommendation:
    """Recommends the fastest candidate, or dense if no gain exceeds the model's error. The first row is dense."""
    best = min(rows, key=lambda row: row.step_ms)
    if best is rows[0] or best.gain < WORTH:
        return Recommendation(tuple(rows), rows[0].spec, 1.0, f"dense is best here: {_not_taken(rows[1:])}")
    reason = f"a step takes {best.step_ms:.4g} ms against {rows[0].step_ms:.4g} ms dense: x{best.gain:.2f}"
    return Recommendation(tuple(rows), best.spec, best.gain, reason)


def _not_taken(others: Sequence[Prediction]) -> str:
    if not others:
        return "no other candidate was given"
    best = min(others, key=lambda row: row.step_ms)
    if best.gain <= 1:
        return f"the best of the others, {best.spec}, is no faster (x{best.gain:.2f})"
    # Rounded down, so that a gain just below WORTH is not shown as WORTH.
    gain = math.floor(100 * best.gain) / 100
    return f"the best of the others, {best.spec}, gains x{gain:.2f}, and a gain below x{WORTH:.2f} is within the model's error"
