"""Measures what compression does, by parameter and in total: bytes, ratio, error, residual, and where the time goes. Off by default.

    opt.measure(every=100, jsonl="metrics.jsonl")        # any wrapper that compresses; once, before training
    opt.metrics()["total"]["relative_error"]             # at any time

Bytes and times cover every step. Values that cost passes over the data (relative error, norms) are measured at every `every`-th step.
Metrics change nothing that is sent or returned, and may be on on some ranks only; if they are on on all ranks, the network is measured
before the first step.

A report is {'step', 'rank', 'size', 'committed', 'measured_at', 'total': values, 'parameters': {name: values}}, with these values:
    bytes                 this rank handed to collectives in the last step. Of a parameter: its payloads alone. In total: with headers, and
                          with the additional rounds in which an engine carries a collective that it lacks by others
    dense_bytes, ratio    bytes of the gradient itself, and dense_bytes / bytes (None if nothing was sent)
    relative_error        ||C(p) - p|| / ||p|| of what was compressed, p, at step `measured_at` (None if p = 0, or not finite)
    total_error           the sum of ||C(p) - p||^2 over the steps that were measured closely so far; with every=1 over all steps: the total
                          error of Sahu et al. 2021, which bounds what compression costs a training with error feedback
    gradient_norm         norm of this rank's gradient (in two levels: of its node's) at that step
    residual_norm         norm of the residual after that step (None if the memory keeps no residual)
    encode_seconds        time from a gradient to its last collective; in total with packing. This and the next two are means over the steps
                          that followed the latest close measurement before the last step
    communicate_seconds   time in which the step started collectives and waited for them; a parameter has a share of its bucket's time, by
                          its bytes. It includes other ranks' delays, and in a LocalCluster their work
    decode_seconds        time from the last collective to the result; in total with unpacking, commit and writing the result
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..driver.driver import Driver
from ..errors import ParameterError, shown
from .advice import Adviser
from .recorder import Recorder, TensorWatch

Report = dict[str, Any]
TIMES = ("encode_seconds", "communicate_seconds", "decode_seconds")


class Metrics:
    """Turns metrics on, and reports the latest values; a wrapper's `measure` makes one.

    every: the steps from one close measurement, and report, to the next. jsonl: a file to which each report is appended as a line of JSON,
    by rank 0 alone, or by every rank if its name contains '{rank}'. sinks: functions that get each report. dead_after: steps of a zero
    gradient after which a layer is called dead. Raises ParameterError."""

    def __init__(
        self, every: int = 100, *, jsonl: str | Path | None = None, sinks: Sequence[Callable[[Report], None]] = (), dead_after: int = 100
    ):
        for name, value in (("every", every), ("dead_after", dead_after)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"metrics: {name} must be a whole number of steps, at least 1, got {shown(value)}")
        self.every, self.jsonl, self.sinks, self.dead_after = every, jsonl, tuple(sinks), dead_after
        self._recorders: list[Recorder] = []

    def attach(self, driver: Driver, *, network: bool = True) -> None:
        """Measures this driver from its next step on. network: whether its collectives cross a network whose speed may be judged.
        Raises GraceError in the middle of a step."""
        judges = network and not driver.grace.two_level
        adviser = Adviser(driver, self.every, self.ended, dead_after=self.dead_after, network=judges)
        driver.observe(adviser)
        self._recorders.append(adviser)

    def ended(self, recorder: Recorder) -> None:
        """Writes and sends a report once all recorders have closely measured the step that this one has ended."""
        if recorder.closely and all(other.measured_at == recorder.step for other in self._recorders):
            report = self.report()
            if self.jsonl is not None and (report["rank"] == 0 or "{rank}" in str(self.jsonl)):
                with open(str(self.jsonl).replace("{rank}", str(report["rank"])), "a") as file:
                    file.write(json.dumps(report) + "\n")
            for sink in self.sinks:
                sink(report)

    def report(self) -> Report:
        """Returns the latest values (see the module); {} before the end of the first step, and if nothing is compressed."""
        seen = [recorder for recorder in self._recorders if recorder.step >= 0]
        if not seen:
            return {}
        info, parameters = seen[0].info, {}
        assert info is not None
        for recorder in seen:
            for name, watch in recorder.watches.items():
                parameters[name] = _values([watch], watch.nbytes, recorder.means(watch))
        watches = [watch for recorder in seen for watch in recorder.watches.values()]
        means = [sum(phase) for phase in zip(*(recorder.means() for recorder in seen), strict=True)]
        total = _values(watches, sum(recorder.driver.wire_bytes for recorder in seen), means)
        return {
            "step": max(recorder.step for recorder in seen), "rank": info.rank, "size": info.size,
            "committed": all(recorder.driver.committed for recorder in seen), "measured_at": max(r.measured_at for r in seen),
            "total": total, "parameters": parameters,
        }  # fmt: skip


class Measured:
    """Gives a wrapper its methods for metrics. The wrapper calls `_attach` with each driver that it makes."""

    _metrics: Metrics | None = None

    def measure(self, every: int = 100, **options: Any) -> Metrics:
        """Turns metrics on, from the next step on; options as for Metrics. A second call starts them anew."""
        return self.measure_by(Metrics(every, **options))

    def measure_by(self, metrics: Metrics) -> Metrics:
        """Turns these metrics on; they can serve one wrapper only."""
        if metrics is not self._metrics:
            self._metrics = metrics
            for driver in self._drivers():
                metrics.attach(driver)
        return metrics

    def metrics(self) -> Report:
        """Returns this rank's latest report (see metrics.py); {} if `measure` was not called, no step was made, or nothing is exchanged."""
        return self._metrics.report() if self._metrics else {}

    def _drivers(self) -> Sequence[Driver]:
        raise NotImplementedError

    def _attach(self, driver: Driver) -> None:
        if self._metrics is not None:
            self._metrics.attach(driver)


def scalars(report: Report) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a report by tag, 'grace/total/ratio' or 'grace/<parameter>/ratio', for TensorBoard and the like."""
    for place, values in [("total", report["total"]), *report["parameters"].items()]:
        yield from ((f"grace/{place}/{key}", float(value)) for key, value in values.items() if value is not None)


def _values(watches: Sequence[TensorWatch], nbytes: int, means: Sequence[float]) -> Mapping[str, Any]:
    dense = sum(watch.spec.nbytes for watch in watches)
    energy, error = sum(watch.input for watch in watches), sum(watch.error for watch in watches)
    return {
        "bytes": nbytes, "dense_bytes": dense, "ratio": dense / nbytes if nbytes else None,
        "relative_error": math.sqrt(error / energy) if energy > 0 and math.isfinite(error + energy) else None,
        "total_error": sum(watch.total_error for watch in watches),
        "gradient_norm": _together(watch.gradient for watch in watches),
        "residual_norm": _together(watch.residual for watch in watches),
        **dict(zip(TIMES, means, strict=True)),
    }  # fmt: skip


def _together(norms: Iterator[float | None]) -> float | None:
    """Returns the norm of all tensors together; None if there is none, or if it is not finite, which JSON cannot express."""
    known = [x for x in norms if x is not None]
    whole = math.hypot(*known)
    return whole if known and math.isfinite(whole) else None
