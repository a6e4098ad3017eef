"""Watches one driver: the clocks and measurements behind metrics.py, which says what the values mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..driver.driver import Driver
from ..driver.layout import Bucket
from ..driver.observer import Observer
from ..errors import Afterwards
from ..exchange.bucket import BucketExchange
from ..exchange.effects import Collective, Effects
from ..exchange.tensor import Job, Outcome
from ..parts.ops import Array, Ops
from ..parts.requests import AllReduce, Gather, Scatter
from ..parts.tensor import StepInfo, TensorSpec

clock = time.perf_counter


class TensorWatch:
    """Watches one tensor: what it sent and how long it took in the step under way, and what was measured last."""

    def __init__(self, spec: TensorSpec):
        self.spec = spec
        self.nbytes = 0
        self.seconds = [0.0, 0.0, 0.0]  # encode, communicate, decode in this step
        self.sums = [0.0, 0.0, 0.0]  # the same over the steps that are averaged
        self.closely = False
        self.input = self.error = 0.0  # squared norms, at the last step that was measured closely
        self.total_error = 0.0  # the sum of `error` over all steps that were
        self.gradient: float | None = None
        self.residual: float | None = None
        self.zero_since: int | None = None  # the step since which this rank's gradient has been zero
        self._step = 0

    def begin(self, step: int, closely: bool) -> None:
        """Begins a step. closely: whether norms are measured, too."""
        self.nbytes, self.seconds, self.closely, self._step = 0, [0.0, 0.0, 0.0], closely, step
        if closely:
            self.input = self.error = 0.0

    def through(self, ops: Ops, job: Job, exchange: Generator[Any, Any, Outcome]) -> Generator[Any, Any, Outcome]:
        """Runs the exchange of the tensor, and measures its time and its requests."""
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

    def _look_at(self, ops: Ops, grad: Array) -> None:
        if self.closely:
            self.gradient = ops.norm(grad)
            zero = self.gradient == 0 and self.spec.size > 0
        elif self.zero_since is None:
            return
        else:  # a gradient that was zero is looked at at every step
            zero = not ops.any_nonzero(grad)
        self.zero_since = (self._step if self.zero_since is None else self.zero_since) if zero else None

    def sent(self, x: float, error: float) -> None:
        """Takes the norms of what was compressed, and of what the payload lost of it."""
        self.input += x**2
        self.error += error**2
        self.total_error += error**2 if math.isfinite(error) else 0.0


class Recorder(Observer):
    """Measures one driver. every: steps from one close look to the next. report: called with this recorder at the end of each step."""

    def __init__(self, driver: Driver, every: int, report: Callable[[Recorder], None]):
        self.driver, self.every, self._report = driver, every, report
        self.watches: dict[str, TensorWatch] = {}
        self.info: StepInfo | None = None
        self.step = -1
        self.seconds, self.sums, self.steps = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0
        self.closely, self.measured_at = False, -1
        self._own = 0.0  # seconds of the driver's own work in this step
        self._waits: dict[str, float] = {}  # by bucket
        self.collectives: list[tuple[str, int]] = []  # kind and bytes of this step's

    # --- as the driver's observer ---------------------------------------------------------------------------------------
    def begin(self, info: StepInfo) -> None:
        if self.closely:  # the last step was measured closely: its times are not averaged with those that follow
            self._forget_times()
        self.info, self.closely = info, info.step % self.every == 0 or self.measured_at < 0
        self.seconds, self._waits, self.collectives = [0.0, 0.0, 0.0], {}, []
        if self.watches.keys() != self.driver.specs.keys():
            self.watches = {name: TensorWatch(spec) for name, spec in self.driver.specs.items()}
        for watch in self.watches.values():
            watch.begin(info.step, self.closely)

    def _forget_times(self) -> None:
        self.sums, self.steps = [0.0, 0.0, 0.0], 0
        for watch in self.watches.values():
            watch.sums = [0.0, 0.0, 0.0]

    def watch(self, name: str) -> TensorWatch:
        return self.watches[name]

    def bucket(self, exchange: BucketExchange) -> BucketExchange:
        """Times the exchange of a bucket: all but its last part is encoding."""
        results: Any = None
        while True:
            begin = clock()
            try:
                collectives = exchange.send(results)
            except StopIteration as stop:
                return stop.value
            self.seconds[0] += clock() - begin
            results = yield collectives
            del collectives

    def effects(self, effects: Effects) -> Effects:
        """Times the driver's own work between the effects, and the network's work during them."""
        answer = None
        with Afterwards(effects.close):
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

    def _bucket(self, effect: Any) -> str:
        """Returns the number of the bucket whose effect it is; '' for effects of no bucket (the agreement, a policy's survey)."""
        place = getattr(effect, "name", "").removeprefix(self.driver.prefix + "/").partition("/")[0]
        return place if place.isdigit() else ""

    def ended(self, buckets: Sequence[Bucket]) -> None:
        assert self.info is not None
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
        self._average()
        self._report(self)

    def _average(self) -> None:
        self.seconds[2], self._own = max(0.0, self._own - self.seconds[0]), 0.0
        self.steps += 1
        self.sums = _added(self.sums, self.seconds)
        for watch in self.watches.values():
            watch.sums = _added(watch.sums, watch.seconds)

    def _measure(self) -> None:
        self.measured_at = self.step
        for name, watch in self.watches.items():
            residual = self.driver.state.get(name, {}).get(self.driver.parts[name][1].unsent_key)
            watch.residual = None if residual is None else self.driver.ops.norm(residual)

    # --- what it measured -----------------------------------------------------------------------------------------------
    def means(self, watch: TensorWatch | None = None) -> list[float]:
        """Returns seconds per step by phase, of one tensor or of all."""
        return [x / max(1, self.steps) for x in (watch or self).sums]


def _added(sums: list[float], more: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(sums, more, strict=True)]


def _payload_bytes(request: Any) -> int:
    """Returns the bytes that a request puts on the wire; requests to the bucket itself (Together, NotFinite) put none."""
    if isinstance(request, AllReduce):
        return Collective("allreduce", request.array, "", dtype=request.dtype).nbytes
    if isinstance(request, Gather):
        return sum(map(len, request.payload)) + 4 * sum(field.variable for field in request.fields)
    if isinstance(request, Scatter):
        counts = 4 * sum(field.variable for fields in request.fields.values() for field in fields)
        return counts + sum(len(array) for payload in request.payloads.values() for array in payload)
    return 0
