"""What compression does, by parameter and in total: bytes, ratio, error, residual, and where the time goes. Off unless asked for.

    opt.measure(every=100, jsonl="metrics.jsonl")        # any wrapper that compresses; once, before training
    opt.metrics()["total"]["relative_error"]             # at any time

Bytes and times are of every step. What costs a pass over the data (relative error, norms) is measured at every `every`-th step, for
which memory and compressor go through their plain forms, whose results are the same bits. So metrics change nothing that is sent or
returned, and need not be on on every rank.

A report is {'step', 'rank', 'size', 'committed', 'measured_at', 'total': values, 'parameters': {name: values}}, where values are
    bytes                 that this rank handed over in the last step; of a parameter: its payloads alone; in total: with headers, and
                          with all rounds in which an engine carries a collective by others
    dense_bytes, ratio    of the gradient itself, and dense_bytes / bytes (None where nothing was sent)
    relative_error        ||C(p) - p|| / ||p|| of what was compressed, p, at step `measured_at` (None for p = 0, or not finite)
    gradient_norm         of this rank's gradient (of its node's, in two levels), then
    residual_norm         of what the memory held back after that step (None where it keeps no residual)
    encode_seconds        mean over the steps since then, that one excepted: from a gradient to its last collective; in total with packing
    communicate_seconds   that the step waited for starting and finishing collectives; of a parameter: of its bucket, by its bytes. Other
                          ranks' delays are in it, and in a LocalCluster their work
    decode_seconds        from the last collective to the result; in total with unpacking, commit and writing the result
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .advice import Advice
from .errors import GraceError, ParameterError
from .exchange import AllReduce, Collective, Gather, Scatter
from .spec import StepInfo, TensorSpec

if TYPE_CHECKING:
    from .driver import Bucket, Driver
    from .exchange import Job

Report = dict[str, Any]
clock = time.perf_counter
TIMES = ("encode_seconds", "communicate_seconds", "decode_seconds")


class Watch:
    """One tensor: what it sent and took in the step under way, and what was measured last."""

    def __init__(self, spec: TensorSpec):
        self.spec = spec
        self.nbytes = 0
        self.seconds = [0.0, 0.0, 0.0]  # encode, communicate, decode in this step
        self.sums = [0.0, 0.0, 0.0]  # the same over the steps that are averaged
        self.closely = False
        self.input = self.error = 0.0  # squared norms, at the last step that was measured closely
        self.gradient: float | None = None
        self.residual: float | None = None
        self.zero_since: int | None = None  # the step since which this rank's gradient has been zero
        self._step = 0

    def begin(self, step: int, closely: bool) -> None:
        self.nbytes, self.seconds, self.closely, self._step = 0, [0.0, 0.0, 0.0], closely, step
        if closely:
            self.input = self.error = 0.0

    def through(self, ops: Any, job: Job, exchange: Generator) -> Generator[Any, Any, Any]:
        """Runs the exchange of the tensor, and looks at its clock and its requests."""
        self._look_at(ops, job.grad)
        answer, seconds = None, self.seconds
        while True:
            begin = clock()
            try:
                request = exchange.send(answer)
            except StopIteration as stop:
                seconds[2] += clock() - begin
                return stop.value
            seconds[0] += clock() - begin
            self.nbytes += _payload_bytes(request)
            answer = yield request

    def _look_at(self, ops: Any, grad: Any) -> None:
        if self.closely:
            self.gradient = norm(ops, grad)
            zero = self.gradient == 0 and self.spec.size > 0
        elif self.zero_since is None:
            return
        else:  # one that was zero is looked at at every step
            zero = not ops.any_nonzero(grad)
        self.zero_since = (self._step if self.zero_since is None else self.zero_since) if zero else None

    def sent(self, ops: Any, x: Any, values: Any) -> None:
        """Takes what was compressed and what its payload stands for."""
        self.input += norm(ops, x) ** 2
        self.error += norm(ops, x - values) ** 2


class Recorder:
    """The metrics of one driver."""

    def __init__(self, metrics: Metrics, driver: Driver, network: bool):
        self.metrics, self.driver = metrics, driver
        self.watches: dict[str, Watch] = {}
        self.step = -1
        self.seconds, self.sums, self.steps = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0
        self.closely, self.measured_at = False, -1
        self._own = 0.0  # seconds of the driver's own work in this step
        self._waits: dict[str, float] = {}  # by bucket
        self.collectives: list[tuple[str, int]] = []  # kind and bytes of this step's
        self.advice = Advice(self, metrics.dead_after, network and not driver.grace.two_level)

    # --- what the driver calls ----------------------------------------------------------------------------------------
    def begin(self, info: StepInfo) -> None:
        """A step begins."""
        if self.closely:  # the last one: its times are not averaged with those that follow
            self._forget_times()
        self.info, self.closely = info, info.step % self.metrics.every == 0 or self.measured_at < 0
        self.seconds, self._waits, self.collectives = [0.0, 0.0, 0.0], {}, []
        if self.watches.keys() != self.driver.specs.keys():
            self.watches = {name: Watch(spec) for name, spec in self.driver.specs.items()}
        for watch in self.watches.values():
            watch.begin(info.step, self.closely)

    def _forget_times(self) -> None:
        self.sums, self.steps = [0.0, 0.0, 0.0], 0
        for watch in self.watches.values():
            watch.sums = [0.0, 0.0, 0.0]

    def bucket(self, exchange: Generator) -> Generator[Any, Any, Any]:
        """The exchange of a bucket: all but its last part is encoding."""
        results = None
        while True:
            begin = clock()
            try:
                collectives = exchange.send(results)
            except StopIteration as stop:
                return stop.value
            self.seconds[0] += clock() - begin
            results = yield collectives
            del collectives

    def effects(self, effects: Generator) -> Generator[Any, Any, Any]:
        """The driver's effects: what is between them is its own work, and they are the network's."""
        answer = None
        try:
            while True:
                begin = clock()
                try:
                    effect = effects.send(answer)
                except StopIteration as stop:
                    self._own += clock() - begin
                    return stop.value
                resumed = clock()
                self._own += resumed - begin
                bucket = self._bucket(effect)
                if bucket and hasattr(effect, "collective"):
                    self.collectives.append((effect.collective.kind, effect.collective.nbytes))
                answer = yield effect
                waited = clock() - resumed
                if bucket:
                    self.seconds[1] += waited
                    self._waits[bucket] = self._waits.get(bucket, 0.0) + waited
        finally:
            effects.close()

    def _bucket(self, effect: Any) -> str:
        """Whose effect it is; '' where it is no bucket's (the agreement, a policy's survey)."""
        place = getattr(effect, "name", "").removeprefix(self.driver.prefix + "/").partition("/")[0]
        return place if place.isdigit() else ""

    def ended(self, buckets: Sequence[Bucket]) -> None:
        """The step is over, and committed where it was finite everywhere."""
        self.step = self.info.step
        for bucket in buckets:
            watches = [self.watches[spec.name] for spec in bucket.specs]
            together = sum(watch.nbytes for watch in watches)
            for watch in watches:
                share = watch.nbytes / together if together else 1 / len(watches)
                watch.seconds[1] = self._waits.get(str(bucket.number), 0.0) * share
        if self.closely:
            self._measure()

    def finished(self) -> None:
        """The driver's work for the step is over, too."""
        self.seconds[2], self._own = max(0.0, self._own - self.seconds[0]), 0.0
        self.steps += 1
        self.sums = _added(self.sums, self.seconds)
        for watch in self.watches.values():
            watch.sums = _added(watch.sums, watch.seconds)
        self.advice.give()
        self.metrics.ended(self)

    def _measure(self) -> None:
        self.measured_at = self.step
        for name, watch in self.watches.items():
            residual = self.driver.state.get(name, {}).get("residual")
            watch.residual = None if residual is None else norm(self.driver.ops, residual)

    # --- what it tells ------------------------------------------------------------------------------------------------
    def means(self, watch: Watch | None = None) -> list[float]:
        """Seconds a step by phase, of a tensor or of all."""
        return [x / max(1, self.steps) for x in (watch or self).sums]


class Metrics:
    """Turns metrics on, and holds what they say last; a wrapper's `measure` makes one.

    every: the steps from one close look, and report, to the next. jsonl: a file to which each report is appended as a line of JSON; by
    rank 0 alone, or by every rank where '{rank}' is in its name. sinks: functions that get each report. dead_after: steps of a zero
    gradient after which a layer is called dead. Raises ParameterError."""

    def __init__(
        self, every: int = 100, *, jsonl: str | Path | None = None, sinks: Sequence[Callable[[Report], None]] = (), dead_after: int = 100
    ):
        for name, value in (("every", every), ("dead_after", dead_after)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"metrics: {name} must be a whole number of steps, at least 1, got {value!r}")
        self.every, self.jsonl, self.sinks, self.dead_after = every, jsonl, tuple(sinks), dead_after
        self._recorders: list[Recorder] = []

    def attach(self, driver: Driver, *, network: bool = True) -> None:
        """Measures this driver from its next step on. network: what carries its collectives is one, whose speed may be judged.
        Raises GraceError in the middle of a step."""
        if driver.under_way:
            raise GraceError("metrics are turned on between steps, not while gradients are under way")
        driver.recorder = Recorder(self, driver, network)
        self._recorders.append(driver.recorder)

    def ended(self, recorder: Recorder) -> None:
        """A recorder has a step; reports where all have had a close look at it."""
        if recorder.closely and all(other.measured_at == recorder.step for other in self._recorders):
            report = self.report()
            if self.jsonl is not None and (report["rank"] == 0 or "{rank}" in str(self.jsonl)):
                with open(str(self.jsonl).replace("{rank}", str(report["rank"])), "a") as file:
                    file.write(json.dumps(report) + "\n")
            for sink in self.sinks:
                sink(report)

    def report(self) -> Report:
        """The latest values (see the module); {} before the first step has ended, and where nothing is compressed."""
        seen = [recorder for recorder in self._recorders if recorder.step >= 0]
        if not seen:
            return {}
        first, parameters = seen[0], {}
        for recorder in seen:
            for name, watch in recorder.watches.items():
                parameters[name] = _values([watch], watch.nbytes, recorder.means(watch))
        watches = [watch for recorder in seen for watch in recorder.watches.values()]
        means = [sum(phase) for phase in zip(*(recorder.means() for recorder in seen), strict=True)]
        total = _values(watches, sum(recorder.driver.wire_bytes for recorder in seen), means)
        return {
            "step": max(recorder.step for recorder in seen), "rank": first.info.rank, "size": first.info.size,
            "committed": all(recorder.driver.committed for recorder in seen), "measured_at": max(r.measured_at for r in seen),
            "total": total, "parameters": parameters,
        }  # fmt: skip


class Measured:
    """What every wrapper offers; `_attach` is called with each driver that it makes."""

    _metrics: Metrics | None = None

    def measure(self, every: int = 100, **options: Any) -> Metrics:
        """Turns metrics on, from the next step on; options as for Metrics. Once more, it starts them anew."""
        return self.measure_by(Metrics(every, **options))

    def measure_by(self, metrics: Metrics) -> Metrics:
        """Turns these metrics on, which serve one wrapper."""
        if metrics is not self._metrics:
            self._metrics = metrics
            for driver in self._drivers():
                metrics.attach(driver)
        return metrics

    def metrics(self) -> Report:
        """This rank's latest report (see metrics.py); {} where `measure` was not called, no step was made, or nothing is exchanged."""
        return self._metrics.report() if self._metrics else {}

    def _drivers(self) -> Sequence[Driver]:
        raise NotImplementedError

    def _attach(self, driver: Driver) -> None:
        if self._metrics is not None:
            self._metrics.attach(driver)


def scalars(report: Report) -> Iterator[tuple[str, float]]:
    """The numbers of a report by tag, 'grace/total/ratio' or 'grace/<parameter>/ratio': for TensorBoard and the like."""
    for place, values in [("total", report["total"]), *report["parameters"].items()]:
        yield from ((f"grace/{place}/{key}", float(value)) for key, value in values.items() if value is not None)


def norm(ops: Any, x: Any) -> float:
    """||x||, summed in float64."""
    return float(ops.block_norms(x, len(x), 2)[0]) if len(x) else 0.0


def _values(watches: Sequence[Watch], nbytes: int, means: Sequence[float]) -> Mapping[str, Any]:
    dense = sum(watch.spec.nbytes for watch in watches)
    energy, error = sum(watch.input for watch in watches), sum(watch.error for watch in watches)
    return {
        "bytes": nbytes, "dense_bytes": dense, "ratio": dense / nbytes if nbytes else None,
        "relative_error": math.sqrt(error / energy) if energy > 0 and math.isfinite(error + energy) else None,
        "gradient_norm": _together(watch.gradient for watch in watches),
        "residual_norm": _together(watch.residual for watch in watches),
        **dict(zip(TIMES, means, strict=True)),
    }  # fmt: skip


def _together(norms: Iterator[float | None]) -> float | None:
    """The norm of all; None where there is none, or it is not finite, which JSON has no word for."""
    known = [x for x in norms if x is not None]
    whole = math.hypot(*known)
    return whole if known and math.isfinite(whole) else None


def _added(sums: list[float], more: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(sums, more, strict=True)]


def _payload_bytes(request: Any) -> int:
    """What a request of exchange.py puts on the wire; Together asks nobody else."""
    if isinstance(request, AllReduce):
        return Collective("allreduce", request.array, "", dtype=request.dtype).nbytes
    if isinstance(request, Gather):
        return sum(map(len, request.payload)) + 4 * sum(field.variable for field in request.fields)
    if isinstance(request, Scatter):
        counts = 4 * sum(field.variable for fields in request.fields for field in fields)
        return counts + sum(len(array) for payload in request.payloads for array in payload)
    return 0
