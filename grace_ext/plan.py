"""What compression gains on a network: `grace-ext plan`, and what 'auto' decides by.

Each candidate's step is recorded on this machine (trace.py) and replayed on the network, stated (cost.py) or measured (probe.py), for
n workers. Work and network are those of the candidate's own codecs and collectives; nothing is fitted to exchanges. Where some candidates
were really exchanged, their times stand in place of what was predicted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import cost, kernels
from .bench import machine
from .composition import Grace, grace
from .cost import Link
from .trace import Event, Network, Shapes, Timed, Trace, record, replay

DENSE = "none"
#: What is compared where nothing is named: dense, and settings that keep their accuracy on the tasks of docs/accuracy.md.
CANDIDATES = (
    DENSE, "fp16", "qsgd(bits=8)", "qsgd(bits=4)", "efsignsgd + residual", "topk(ratio=0.01) + residual",
    "powersgd(rank=4) + residual",
)  # fmt: skip
#: A gain below this is within the model's error: dense is recommended, which loses nothing.
WORTH = 1.1
#: Between workers of one node, where nothing is said: what sockets over shared memory carry.
INSIDE = Link(20e9, 20e-6)
RATES = (1e5, 1e13)


@dataclass(frozen=True)
class OnLink:
    """The network that cost.py describes: nodes of `per_node` workers, each node with one link."""

    link: Link
    per_node: int = 1

    def __call__(self, kind: str, n: int, nbytes: float) -> float:
        if kind == "broadcast":
            return n * cost.broadcast(self.link, n, nbytes)
        if kind == "alltoall" and 1 < self.per_node < n and n % self.per_node == 0:
            # A ring crosses from node to node once; here every worker of a node sends to every worker of the others.
            crossing = self.per_node * (n - self.per_node) / n * nbytes
            return self.link.overhead + (n - 1) * self.link.latency + crossing * self.link.beta
        return {"allreduce": cost.allreduce, "allgather": cost.allgather, "alltoall": cost.alltoall}[kind](self.link, n, nbytes)


@dataclass(frozen=True)
class Row:
    """A candidate's step. Times are milliseconds: see trace.Timed; `gain`: dense step / this step; `break_even`: the rate of the links,
    bits per second, above which dense is faster (None: it never is, or always: then `gain` is below 1); `measured_ms`: an exchange that
    was really made, where it was."""

    spec: str
    nbytes: float
    step_ms: float
    exchange_ms: float
    work_ms: float
    network_ms: float
    gain: float
    break_even: float | None
    measured_ms: float | None = None
    uncalibrated_ms: float | None = None


@dataclass(frozen=True)
class Advice:
    """The candidates, dense first; the spec to use, how many times faster its step is than the dense one, and why, in words."""

    rows: tuple[Row, ...]
    spec: str
    gain: float
    reason: str


class Model:
    """Traces of candidates for one model's shapes, and what they take on a network. `compute`: seconds of forward and backward pass."""

    def __init__(self, traces: dict[str, Trace], n: int, *, per_node: int = 1, inside: Link = INSIDE, compute: float = 0.0):
        self.traces, self.n, self.per_node, self.inside, self.compute = traces, n, per_node, inside, compute

    def timed(self, spec: str, network: Network, compute: float | None = None) -> Timed:
        """One step. In two levels: the nodes' exchange on a link each, and before and after it what goes on inside."""
        compute, trace = self.compute if compute is None else compute, self.traces[spec]
        if not (trace.two_level and self.per_node > 1):
            return replay(trace.on(self.n), network, self.n, compute)
        nodes = self.n // self.per_node
        between = replay(trace.on(nodes), network, nodes, compute)
        inside = cost.two_level(self.inside, self.per_node, trace.dense, 0.0, nodes * trace.nbytes(nodes))
        return replace(between, step=between.step + inside, exchange=between.exchange + inside, network=between.network + inside)

    def rows(self, network: Network, link: Link, measured: dict[str, float] | None = None) -> list[Row]:
        """One row a candidate. `network` carries them; `link` is varied for the break-even rate; `measured`: seconds of real exchanges."""
        measured, found = measured or {}, {spec: self.timed(spec, network) for spec in self.traces}
        alone = {spec: self.timed(spec, network, 0.0).exchange for spec in self.traces}
        # What overlaps with the backward pass does so whatever else an exchange takes.
        exchanges = {spec: measured.get(spec, alone[spec]) + timed.exchange - alone[spec] for spec, timed in found.items()}
        steps = {spec: self.compute + exchange for spec, exchange in exchanges.items()}
        dense = steps[next(iter(steps))]
        return [
            Row(
                spec, self.traces[spec].nbytes(self.n), 1000 * steps[spec], 1000 * exchanges[spec], 1000 * timed.work, 1000 * timed.network,
                dense / steps[spec], self.break_even(spec, link), 1000 * measured[spec] if spec in measured else None,
                1000 * alone[spec] if measured else None,
            )
            for spec, timed in found.items()
        ]  # fmt: skip

    def break_even(self, spec: str, link: Link) -> float | None:
        """The rate at which this candidate's step takes as long as the dense one; None where one of them is faster at any rate."""
        dense = next(iter(self.traces))

        def gained(rate: float) -> float:
            network = OnLink(replace(link, rate=rate), self.per_node)
            return self.timed(dense, network).step - self.timed(spec, network).step

        low, high = RATES
        if spec == dense or gained(low) <= 0 or gained(high) >= 0:
            return None
        while high / low > 1.01:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if gained(middle) > 0 else (low, middle)
        return math.sqrt(low * high)


def advise(rows: Sequence[Row]) -> Advice:
    """The fastest candidate, or dense where none is faster by more than the model can tell. The first row is dense."""
    best = min(rows, key=lambda row: row.step_ms)
    if best is rows[0] or best.gain < WORTH:
        told = f"the best of the others, {min(rows[1:], key=lambda row: row.step_ms).spec}, gains" if len(rows) > 1 else "gains of others:"
        others = max((row.gain for row in rows[1:]), default=1.0)
        reason = f"dense is best here: {told} x{others:.2f}, and below x{WORTH} a gain is within the model's error"
        return Advice(tuple(rows), rows[0].spec, 1.0, reason)
    reason = f"a step takes {best.step_ms:.4g} ms against {rows[0].step_ms:.4g} ms dense: x{best.gain:.2f}"
    return Advice(tuple(rows), best.spec, best.gain, reason)


def candidates(texts: Sequence[str], n: int, per_node: int = 1) -> dict[str, Grace]:
    """The specs to compare, by their full text, dense first; without any named, CANDIDATES, for more than 4 workers what reduces, and with
    several workers a node all of them in two levels, too."""
    levels = [f"{text} @ hierarchical" for text in CANDIDATES] if per_node > 1 else []
    chosen = list(texts) or [*CANDIDATES, *(["efsignsgd + residual @ reduce_scatter"] if n > 4 else []), *levels]
    graces = [grace(DENSE), *map(grace, chosen)]
    return {str(g): g for g in graces}


def traces(chosen: dict[str, Grace], shapes: Shapes, *, fresh: bool, tell: Callable[[str], None] = lambda text: None) -> dict[str, Trace]:
    """Each candidate's trace on this machine: from the cache, where it was recorded by this version before, unless `fresh`."""
    made = {}
    for text, g in chosen.items():
        tell(text)
        file = kernels.cache() / "traces" / f"{_key(g, shapes)}.json"
        made[text] = (None if fresh else _load(file)) or _kept(file, record(g, shapes))
    return made


def _key(g: Grace, shapes: Shapes) -> str:
    """Of all that a trace depends on: machine, versions, this package's code, the composition and the shapes."""
    digest = hashlib.sha256(json.dumps([machine(), str(g), g.seed, {name: list(dims) for name, dims in shapes.items()}]).encode())
    for file in _sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _sources() -> Iterator[Path]:
    yield from sorted(Path(__file__).parent.rglob("*.py"))


def _load(file: Path) -> Trace | None:
    try:
        saved = json.loads(file.read_text())
        return Trace(*(tuple(Event(**event) for event in saved[which]) for which in ("alone", "pair")), saved["dense"], saved["two_level"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        return None


def _kept(file: Path, trace: Trace) -> Trace:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(trace)))
        fresh.replace(file)
    except OSError:  # a cache that cannot be written
        pass
    return trace
