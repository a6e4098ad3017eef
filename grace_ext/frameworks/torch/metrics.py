"""`MetricsHook`: writes the metrics of compression (grace_ext/metrics) to files, for everything that compresses in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...metrics.metrics import Measured, Metrics, Report, scalars


def MetricsHook(  # noqa: N802 (it stands where a class could)
    measured: Measured, every: int = 100, *, jsonl: str | Path | None = None, tensorboard: str | Path | None = None, **options: Any
) -> Metrics:
    """Turns metrics on: a report every `every` steps. Returns the Metrics, whose `report()` is the latest report as a dictionary.

        hvd.MetricsHook(opt, every=100, jsonl="metrics.jsonl", tensorboard="runs/topk")

    measured: a DistributedOptimizer, the state of a DDP hook, or a bound compression; anything else raises UnsupportedError.
    jsonl, options: as for grace_ext.metrics.Metrics.
    tensorboard: a folder for event files, which rank 0 writes. Raises ImportError at once if the tensorboard package is missing."""
    if not hasattr(measured, "measure"):
        raise UnsupportedError(
            f"MetricsHook takes a DistributedOptimizer, a DDP hook's state or a bound compression, got {type(measured).__name__}; "
            "LocalSGD, which sends drifts at some steps only, has `wire_bytes`"
        )
    sinks = [*options.pop("sinks", ())]
    if tensorboard is not None:
        sinks.append(_TensorBoard(tensorboard))
    return measured.measure(every, jsonl=jsonl, sinks=sinks, **options)


class _TensorBoard:
    """A sink that writes rank 0's reports as scalars."""

    def __init__(self, folder: str | Path):
        from torch.utils.tensorboard import SummaryWriter

        self._make = lambda: SummaryWriter(str(folder))
        self._writer: SummaryWriter | None = None  # made by rank 0 alone, at its first report

    def __call__(self, report: Report) -> None:
        if report["rank"]:
            return
        if self._writer is None:
            self._writer = self._make()
        for tag, value in scalars(report):
            self._writer.add_scalar(tag, value, report["step"])
        self._writer.flush()
