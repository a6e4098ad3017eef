"""The noise of SGD with error feedback falls as 1/n, n being the number of workers, as that of dense SGD does."""

from __future__ import annotations

import numpy as np

from .experiment import Check, Experiment, Outcome, Progress
from .problems import descend

SPECS, SIZES, COLUMNS, RATE = ("none", "threshold(threshold=1.0) + residual", "topk(ratio=0.1) + residual"), (1, 4, 16), 50, 0.02


def floor(spec: str, n: int, seed: int, steps: int) -> float:
    """Returns the mean of f(x) = |x|^2 / 2 late in a descent from 0, with unit noise on each worker's gradient."""
    generator = np.random.default_rng(seed)
    late: list[float] = []
    descend(
        spec,
        lambda x, step: [x + generator.standard_normal(COLUMNS) for _ in range(n)],
        np.zeros(COLUMNS),
        RATE,
        steps,
        lambda step, x, cluster: late.append(float(x @ x / 2)) if step > steps // 3 else None,
    )
    return float(np.mean(late))


def run(quick: bool, progress: Progress) -> Outcome:
    seeds, rows, checks = range(1 if quick else 3), [], []
    for place, spec in enumerate(SPECS):
        floors = [float(np.mean([floor(spec, n, seed, 1200) for seed in seeds])) for n in SIZES]
        rows.append([spec, *floors])
        for one, more, first, second in zip(SIZES, SIZES[1:], floors, floors[1:], strict=False):
            checks.append(
                Check(f"{spec}: the floor of {one} over that of {more} workers is 2.5 to 6", first / second, 2.5 < first / second < 6)
            )
        progress((place + 1) / len(SPECS))
    return Outcome(["spec", *(f"{n} workers" for n in SIZES)], rows, checks)


EXPERIMENT = Experiment(
    "linear_speedup",
    "The noise floor falls linearly with the number of workers",
    "Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization)",
    "SGD with a hard threshold and error feedback has the linear speed-up of SGD (theorem 4).",
    "a bound, no measured figure",
    "f(x) = |x|^2 / 2 with 50 elements, unit normal noise on every worker's gradient, rate 0.02, 1,200 steps; the mean of f over the last "
    "two thirds; three seeds. (Top-k does the same on this homogeneous problem: the paper's difference is in the bounds.)",
    "four times as many workers divide the floor by 2.5 to 6",
    0.5,
    run,
)
