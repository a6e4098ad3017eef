"""Trains specs side by side for experiments that compare accuracy: the same examples for all, and for each the best of the same rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .experiment import Check, Progress, in_units, with_torch

if TYPE_CHECKING:
    from ..studies.training import Run

SEEDS, RATES = 3, (0.5, 1.0, 2.0)
COLUMNS = ["spec", "score", "bytes per rank and step", "learning rate"]


def tuned(rates: str) -> str:
    """Returns the sentence of a recipe that says how learning rates are chosen."""
    return (
        f"All specs have the same initial weights and examples, and each the best of {rates} times dense training's learning rate, found "
        "with another seed."
    )


TUNED = tuned("0.5, 1 and 2")


def compared(
    task: str, specs: Sequence[str], quick: bool, progress: Progress, *, seeds: int = SEEDS, rates: Sequence[float] = RATES, **options: Any
) -> dict[str, list[Run]]:
    """Returns the trainings of each spec; quick: one short one each. options: those of grace_ext.studies.training.train."""
    with_torch()
    from ..studies.training import Trainings, amount

    if quick:
        seeds, rates, options = 1, (1.0,), {**options, "steps": 40}
    add = in_units(progress, amount(specs, range(seeds), rates))
    with Trainings(task) as trainings:
        return trainings.runs(specs, range(seeds), rates, add, **options)


def mean(runs: Sequence[Run]) -> float:
    return statistics.mean(run.score for run in runs)


def nbytes(runs: Sequence[Run]) -> float:
    return statistics.mean(run.nbytes for run in runs)


def sd(runs: Sequence[Run]) -> float:
    return statistics.stdev(run.score for run in runs) if len(runs) > 1 else 0.0


def row(runs: Sequence[Run]) -> list[Any]:
    """Returns the cells of COLUMNS."""
    return [runs[0].spec, f"{mean(runs):.2f} ± {sd(runs):.2f}", nbytes(runs), runs[0].rate]


def at_least(what: str, mine: Sequence[Run], other: Sequence[Run], slack: float | None = None, higher_is_better: bool = True) -> Check:
    """Checks that `mine` has a score no worse than that of `other`, less `slack`; by default less the standard deviation of the seeds,
    pooled over both. Measures by how much it is better."""
    slack = ((sd(mine) ** 2 + sd(other) ** 2) / 2) ** 0.5 if slack is None else slack
    better = mean(mine) - mean(other) if higher_is_better else mean(other) - mean(mine)
    return Check(f"{what}: the score less that of the other is at least {-slack:.2f}", better, better >= -slack)
