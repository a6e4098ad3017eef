"""Compares the scores of a threshold and of Top-k, by layer and of the whole model, at equal volume; one experiment per task."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .compared import COLUMNS, RATES, SEEDS, TUNED, at_least, mean, nbytes, row
from .experiment import Check, Curve, Experiment, Outcome, Progress, in_units, with_torch

if TYPE_CHECKING:
    from ..studies.training import Trainings

DENSITIES = (0.001, 0.003, 0.01, 0.03)
#: A threshold of the same volume is looked for between these, by so many bisections.
LOW, HIGH, BISECTIONS = 1e-5, 1.0, 6


def thresholds(trainings: Trainings, volumes: list[float], bisections: int, add: Callable[[], None], **options: Any) -> list[str]:
    """Returns a spec per volume, with the lowest threshold found that sends no more, in a training with the seed for tuning."""
    low, high = [LOW] * len(volumes), [HIGH] * len(volumes)
    for _ in range(bisections):
        tried = [(a * b) ** 0.5 for a, b in zip(low, high, strict=True)]
        runs = [trainings.start(f"threshold(threshold={value:.6g}) + residual", trainings.tuning_seed, **options) for value in tried]
        for place, (run, value) in enumerate(zip(runs, tried, strict=True)):
            (high if run.result().nbytes <= volumes[place] else low)[place] = value
            add()
    return [f"threshold(threshold={value:.6g}) + residual" for value in high]


def run(name: str, quick: bool, progress: Progress) -> Outcome:
    with_torch()
    from ..studies.training import Trainings, amount

    seeds, rates, bisections = (1, (1.0,), 2) if quick else (SEEDS, RATES, BISECTIONS)
    options: dict[str, Any] = {"total_error": True, **({"steps": 40} if quick else {})}
    kinds = {kind: [f"{kind}(ratio={density:g}) + residual" for density in DENSITIES] for kind in ("topk", "global_topk")}
    add = in_units(progress, 3 * amount(kinds["topk"], range(seeds), rates) + bisections * len(DENSITIES))
    with Trainings(name) as trainings:
        runs = trainings.runs([*kinds["topk"], *kinds["global_topk"]], range(seeds), rates, add, **options)
        found = {kind: [runs[spec] for spec in specs] for kind, specs in kinds.items()}
        specs = thresholds(trainings, [nbytes(one) for one in found["topk"]], bisections, add, **options)
        found["threshold"] = list(trainings.runs(specs, range(seeds), rates, add, **options).values())
        higher = trainings.task.higher_is_better
    errors = {kind: [statistics.mean(run.total_error for run in one) for one in of] for kind, of in found.items()}
    rows, checks, curves = [], [], []
    for kind, of in found.items():
        rows += [[density, *row(one), error] for density, one, error in zip(DENSITIES, of, errors[kind], strict=True)]
        worse = [100 - mean(one) if higher else mean(one) for one in of]
        curves.append(Curve(kind, [nbytes(one) for one in of], worse))
    for place, density in enumerate(DENSITIES):
        mine, other = found["threshold"][place], found["topk"][place]
        checks.append(at_least(f"density {density:g}, threshold and topk", mine, other, higher_is_better=higher))
        ratio = errors["threshold"][place] / errors["topk"][place]
        checks.append(Check(f"density {density:g}: the threshold's total error over topk's is below 1", ratio, ratio < 1))
    axes = ("bytes per rank and step", "100 - accuracy, %" if higher else "bits per character")
    return Outcome(["density", *COLUMNS, "total error"], rows, checks, curves, axes, ("log", "log" if higher else "linear"))


def described(name: str, task: str, what: str, title: str, minutes: float) -> Experiment:
    return Experiment(
        name,
        title,
        "Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization)",
        "The hard threshold has the best metric at every data volume, on vision and language models (figure 2; total error: 3, 5, 6).",
        "curves only; ResNet-18 on CIFAR-10, LSTM on WikiText-2 and others, on 8 GPUs",
        f"Two simulated ranks; {what}, as `grace-ext compare --data {task}` trains it. Top-k of each layer and of the whole model keep "
        f"0.1% to 3%; the threshold is found by bisection, so that it sends no more than Top-k of each layer. Three seeds. {TUNED}",
        "at every volume the threshold's score is at least that of Top-k less the seeds' standard deviation, and its total error is lower",
        minutes,
        partial(run, task),
        in_quick_run=False,
    )


IMAGES = described(
    "volumes",
    "mnist",
    "the small CNN on MNIST's digits",
    "At every volume a hard threshold is as good as Top-k, with a smaller total error: images",
    10,
)
TEXT = described(
    "volumes_text",
    "charlm",
    "the Transformer with 113,000 parameters on English text, with AdamW",
    "At every volume a hard threshold is as good as Top-k, with a smaller total error: text",
    15,
)
