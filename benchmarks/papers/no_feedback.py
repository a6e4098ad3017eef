"""Sparsification without error feedback is worse even if it sends ten times as much."""

from __future__ import annotations

from grace_ext.papers.experiment import Check, Experiment, Outcome, Progress

from .compared import COLUMNS, TUNED, compared, mean, row

TASKS, KEPT = ("mnist", "charlm"), 0.01
RATES = (0.25, 0.5, 1.0, 2.0)


def run(quick: bool, progress: Progress) -> Outcome:
    rows, checks = [], []
    for place, task in enumerate(TASKS):
        specs = ["none + none", *(f"topk(ratio={ratio:g}) + {memory}" for ratio in (KEPT, 10 * KEPT) for memory in ("residual", "none"))]
        runs = compared(task, specs, quick, lambda share, place=place: progress((place + share) / len(TASKS)), rates=RATES)
        rows += [[task, *row(of)] for of in runs.values()]
        fed, plain = (mean(runs[f"topk(ratio={ratio:g}) + {memory}"]) for ratio, memory in ((KEPT, "residual"), (10 * KEPT, "none")))
        better = fed - plain if task == "mnist" else plain - fed
        checks.append(Check(f"{task}: topk 1% with error feedback less topk 10% without it, in favour of the former", better, better > 0))
    return Outcome(["task", *COLUMNS], rows, checks)


EXPERIMENT = Experiment(
    "no_feedback",
    "Without error feedback ten times the volume is not enough",
    "Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization)",
    "Without error feedback sparsifiers miss the baseline, even at a higher density than with it.",
    "curves only",
    f"Two simulated ranks, the tasks of `grace-ext compare`, Top-k of 1% and of 10% with memory residual and with none. Three seeds. "
    f"{TUNED.replace('0.5, 1 and 2', '0.25, 0.5, 1 and 2')}",
    "topk 1% with error feedback has a better score than topk 10% without it, on both tasks",
    6,
    run,
    quick=False,
)  # fmt: skip
