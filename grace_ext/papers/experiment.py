"""Defines what every experiment has: a description, which the run, the page and the picture use, and the outcome of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UnsupportedError

#: Is told, as a share of 1, how much of an experiment is done.
Progress = Callable[[float], None]


def in_units(progress: Progress, units: float) -> Callable[..., None]:
    """Returns a function that is told what has been done, in units of which there are so many, and tells `progress` the share of all."""
    done = 0.0

    def add(more: float = 1.0) -> None:
        nonlocal done
        done += more
        progress(min(done / units, 1.0))

    return add


def part(progress: Progress, begins: float, length: float) -> Progress:
    """Returns what a part of an experiment tells its progress, which begins at a share of the whole and has this length."""
    return lambda share: progress(begins + length * share)


def with_torch() -> None:
    """Makes torch use one thread, because the models are small. Raises UnsupportedError without it."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError("this experiment trains models, for which it needs torch: pip install 'grace_ext[torch,privacy]'") from None
    torch.set_num_threads(1)


class Check(NamedTuple):
    """Says one condition of an experiment's criterion in words, and whether the measured value meets it."""

    text: str
    measured: float
    holds: bool


class Curve(NamedTuple):
    """Describes one line of the picture."""

    label: str
    x: list[float]
    y: list[float]


@dataclass
class Outcome:
    """Holds what a run has measured. checks: the parts of the criterion; all must hold."""

    columns: list[str]
    rows: list[list[Any]]
    checks: list[Check]
    curves: list[Curve] = field(default_factory=list)
    axes: tuple[str, str] = ("", "")  # the picture's labels
    scales: tuple[str, str] = ("linear", "log")  # of its axes

    def __post_init__(self) -> None:  # plain values, for JSON
        self.rows = [[cell.item() if hasattr(cell, "item") else cell for cell in row] for row in self.rows]
        self.checks = [Check(text, float(measured), bool(holds)) for text, measured, holds in self.checks]

    @property
    def reproduced(self) -> bool:
        return all(check.holds for check in self.checks)


@dataclass(frozen=True)
class Experiment:
    """Describes one experiment. run(quick, progress) makes it; quick: smaller, for a check in minutes. in_quick_run: whether
    `make papers QUICK=1` runs it, because its criterion means something for the smaller run, too.

    claim: what the paper says, in our words. figure: the paper's own number, or 'not available'. minutes: on two free cores."""

    name: str
    title: str
    paper: str
    claim: str
    figure: str
    recipe: str
    criterion: str
    minutes: float
    run: Callable[[bool, Progress], Outcome]
    in_quick_run: bool = True
