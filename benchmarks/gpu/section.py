"""Defines what every section of gpu_check.py has, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.machine import Machine
from grace_ext.papers.experiment import Check, Outcome, Progress

__all__ = ["Check", "Found", "Progress", "Section", "none_of", "short"]


@dataclass
class Found(Outcome):
    """Holds what a section has found, as an experiment of a paper does. notes: where it ran, and what was not run."""

    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """Describes one section. dry: what its dry run runs on."""

    name: str
    title: str
    dry: str
    run: Callable[[Machine, Progress], Found]


def none_of(what: str, of: int, found: Iterable[Any]) -> Check:
    """Returns the check that this list is empty; `of`: how many were looked at."""
    number = len(list(found))
    return Check(f"{what}, of {of} (must be 0)", number, number == 0 and of > 0)


def short(error: BaseException) -> str:
    """Returns an error as one line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
