"""With a shift by each worker's gradient at the optimum (EF-GDstar), a hard threshold converges as near as wanted, and sends little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cluster import LocalCluster
from .experiment import Check, Curve, Experiment, Outcome, Progress
from .problems import Logistic, descend, elements_sent

ROWS, COLUMNS, THRESHOLD = 1000, 100, 1e-3  # the threshold is on rate times gradient
CASES = {20: 1, 100: 5}  # the workers, and the k of Top-k


def descent(
    problem: Logistic, best: np.ndarray, workers: int, spec: str, steps: int, progress: Progress
) -> tuple[list[float], float | None]:
    """Returns f - f* at every 20th step, and the elements that a worker sends per step in the last fifth if a threshold chooses them."""
    shares = problem.shares(workers)
    gap: list[float] = []
    late: list[float] = []

    def watch(step, x, cluster):
        if step % 20 == 0:
            gap.append(problem.value(x) - problem.value(best))
            progress(step / steps)
        if step > 0.8 * steps and "threshold" in spec:
            late.append(np.mean([elements_sent(nbytes, COLUMNS) for nbytes in cluster.wire_bytes]))

    prepare = shifted(problem, best, workers) if spec.endswith("ef_star") else lambda cluster: None
    descend(spec, lambda x, step: [problem.gradient(x, share) for share in shares], best + 0.3, problem.gamma, steps, watch, prepare)
    return gap, float(np.mean(late)) if late else None


def shifted(problem: Logistic, best: np.ndarray, workers: int) -> Callable[[LocalCluster], None]:
    """Returns a function that gives the memories ef_star of a cluster the workers' gradients at the optimum."""

    def prepare(cluster: LocalCluster) -> None:
        for driver, share in zip(cluster.drivers, problem.shares(workers), strict=True):
            state = {"residual/x": np.zeros(len(best), np.float32), "shift/x": problem.gradient(best, share).astype(np.float32)}
            driver.load_state_dict({**driver.state_dict(), "state": state})

    return prepare


def compare(workers: int, k: int, steps: int, limit: float, progress: Progress) -> tuple[list[list[Any]], list[Check], list[Curve]]:
    """Returns the rows, checks and curves of the three methods at that number of workers."""
    problem = Logistic.random(ROWS, COLUMNS, 1e-3)
    best, threshold = problem.minimum(), f"threshold(threshold={float(THRESHOLD / problem.gamma)!r})"
    specs = {
        f"Top-{k}, EF-GDstar": f"topk(ratio={k / COLUMNS}) + ef_star",
        "threshold, EF-GDstar": f"{threshold} + ef_star",
        "threshold, plain error feedback": f"{threshold} + residual",
    }
    rows: list[list[Any]] = []
    curves = []
    for number, (label, spec) in enumerate(specs.items()):

        def part(share: float, number: int = number) -> None:
            progress((number + share) / len(specs))

        gap, sent = descent(problem, best, workers, spec, steps, part)
        rows.append([workers, label, gap[-1], k if sent is None else sent])
        curves.append(Curve(f"{workers} workers: {label}", list(range(20, steps + 1, 20)), [max(value, 1e-17) for value in gap]))
    _, (*_, gap_at_end, shifted_sends), (*_, plain_sends) = rows
    checks = [
        Check(f"{workers} workers: with the shift, f - f* gets below {limit:g}", gap_at_end, gap_at_end < limit),
        Check(
            f"{workers} workers: with the shift, each worker sends fewer than one element per step in the mean", shifted_sends,
            shifted_sends < 1,
        ),
        Check(f"{workers} workers: without it, more than 50 of {COLUMNS}", plain_sends, plain_sends > 50),
    ]  # fmt: skip
    return rows, checks, curves


def run(quick: bool, progress: Progress) -> Outcome:
    steps, limit = (2500, 1e-5) if quick else (8000, 1e-8)
    cases = dict(list(CASES.items())[:1]) if quick else CASES
    rows: list[list[Any]] = []
    checks: list[Check] = []
    curves: list[Curve] = []
    done = 0
    for workers, k in cases.items():

        def part(share: float, before: int = done, workers: int = workers) -> None:
            progress((before + share * workers) / sum(cases))

        new_rows, new_checks, new_curves = compare(workers, k, steps, limit, part)
        rows += new_rows
        checks += new_checks
        curves += new_curves
        done += workers
    return Outcome(
        ["workers", "method", "f - f* at the end", "elements per worker and step, late"], rows, checks, curves, ("step", "f - f*")
    )


EXPERIMENT = Experiment(
    "ef_star",
    "A threshold with shifted error feedback converges as near as wanted, sending less than Top-k",
    "Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization)",
    "EF-GDstar with a hard threshold converges to an arbitrarily small neighbourhood of the optimum, with less data than Top-k (figures 8 "
    "and 9; madelon, 20 workers against Top-1, 100 against Top-5).",
    "curves only",
    "20 workers against Top-1 and 100 against Top-5; logistic regression on generated data, 1,000 x 100, mu = L / 1,000, full gradients, "
    "threshold 0.001 on rate times gradient, 8,000 steps from x* + 0.3; memory ef_star starts from the gradients at the "
    "optimum, as the method supposes.",
    "with the shift f - f* gets below 1e-8, and each worker sends fewer than one element per step in the mean of the last fifth of the "
    "descent; without the shift it sends more than 50",
    33,
    run,
)
