"""Estimates the time to a target for PowerSGD's ranks: steps of simulated trainings times the step predicted for a slow network."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from ..planning.cost import Link
from .compared import TUNED, compared
from .experiment import Check, Curve, Experiment, Outcome, Progress, part, with_torch

if TYPE_CHECKING:
    from ..studies.training import Run

TARGETS = {"mnist": 95.0, "charlm": 3.2}
SPECS = ("none", *(f"powersgd(rank={rank}) + residual" for rank in (1, 2, 4)))
WORKERS, LINK, EVERY = 8, "100mbit", 20


def steps_to(run: Run, target: float, higher_is_better: bool) -> float:
    """Returns the first measured step whose score reaches the target; infinity if none does."""
    return next((step for step, score in run.curve if (score >= target) == higher_is_better or score == target), math.inf)


def run(quick: bool, progress: Progress) -> Outcome:
    with_torch()
    from ..studies.comparison import computing, predicted
    from ..studies.task import task

    rows, checks, curves = [], [], []
    for place, (name, target) in enumerate(TARGETS.items()):
        its = task(name)
        runs = compared(name, SPECS, quick, part(progress, place / len(TARGETS), 1 / len(TARGETS)), every=EVERY)
        exchange = predicted(its, SPECS, Link.of(LINK, 50e-6), WORKERS, lambda text: None)
        step, took = computing(its), {}
        for spec, of in runs.items():
            steps = [steps_to(each, target, its.higher_is_better) for each in of]
            each_step = step + exchange[spec] / 1000
            took[spec] = each_step * statistics.mean(steps)
            reached = (
                "not by all seeds" if took[spec] == math.inf else f"{statistics.mean(steps):.0f} ({min(steps):.0f} to {max(steps):.0f})"
            )
            seconds = "-" if took[spec] == math.inf else took[spec]
            rows.append([name, spec, reached, 1000 * step, exchange[spec], seconds, of[0].rate])
            line = [statistics.mean(score for _, score in points) for points in zip(*(each.curve for each in of), strict=True)]
            worse = [100 - score for score in line] if its.higher_is_better else line
            curves.append(Curve(f"{name}, {spec}", [each_step * number for number, _ in of[0].curve], worse))
        if not its.higher_is_better:
            dense, *others = took.values()
            best = min(others)
            faster = dense / best if best < math.inf else 0.0
            checks.append(Check(f"{name}: dense training's time over that of the fastest rank is above 1", faster, faster > 1))
    columns = [
        "task",
        "spec",
        "steps to the target (range of the seeds)",
        "computing, ms",
        "predicted exchange, ms",
        "seconds to the target",
        "learning rate",
    ]
    return Outcome(columns, rows, checks, curves, ("seconds", "100 - accuracy, %; bits per character"))


EXPERIMENT = Experiment(
    "time_to_target",
    "Time to a target by rank: PowerSGD wins on language",
    "Vogels, Karimireddy, Jaggi 2019 (PowerSGD)",
    "PowerSGD shortens training of convolutional networks and of LSTMs; on images the gain is mixed, on language it is clear.",
    "not available: the paper's figures could not be read",
    f"Steps to {TARGETS['mnist']:g}% on MNIST and to {TARGETS['charlm']:g} bits per character, from scores at every {EVERY}th step of "
    "trainings with two simulated ranks, three seeds; times the computing measured here, plus the exchange that the planner predicts for "
    f"{WORKERS} workers at 100 Mbit/s, without overlap. benchmarks/time_to_accuracy measures rank 4 on real links. {TUNED}",
    "on the language task a rank of PowerSGD is faster than SGD; times on images are reported",
    10,
    run,
    in_quick_run=False,
)
