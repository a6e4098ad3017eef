"""`MetricsHook`: the metrics of compression (grace_ext/metrics.py) to files, for whatever compresses in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...metrics.metrics import Measured, Metrics, Report, scalars


def MetricsHook(  # noqa: N802 (it stands where a class could)
    measured: Measured, every: int = 100, *, jsonl: str | Path | None = None, tensorboard: str | Path | None = None, **options: Any
) -> Metrics:
    """Turns metrics on for a DistributedOptimizer, a DDP hook's state, or a bound compression: a report every `every` steps.

        hvd.MetricsHook(opt, every=100, jsonl="metrics.jsonl", tensorboard="runs/topk")

    jsonl, options: as for grace_ext.metrics.Metrics. tensorboard: a folder for event files, written by rank 0 (needs the tensorboard
    package, else ImportError, here). Returns the Metrics, whose `report()` is the latest as a dictionary."""
    if not hasattr(measured, "measure"):
        raise UnsupportedError(
            f"MetricsHook takes a DistributedOptimizer, a DDP hook's state or a bound compression, got {type(measured).__name__}; "
            "LocalSGD, which sends drifts now and then, has `wire_bytes`"
        )
    sinks = [*options.pop("sinks", ())]
    if tensorboard is not None:
        sinks.append(_TensorBoard(tensorboard))
    return measured.measure(every, jsonl=jsonl, sinks=sinks, **options)


class _TensorBoard:
    """A sink: rank 0's reports as scalars."""

    def __init__(self, folder: str | Path):
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._writer = lambda: SummaryWriter(str(folder)), None

    def __call__(self, report: Report) -> None:
        if report["rank"]:
            return
        if self._writer is None:
            self._writer = self._make()
        for tag, value in scalars(report):
            self._writer.add_scalar(tag, value, report["step"])
        self._writer.flush()
