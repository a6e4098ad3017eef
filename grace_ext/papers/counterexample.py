"""PowerSGD can stall for ever where PowerSGD+ does not."""

from __future__ import annotations

import numpy as np

from ..cluster import LocalCluster
from ..parts.tensor import TensorSpec
from .experiment import Check, Curve, Experiment, Outcome, Progress

TARGET, RATE = np.diag([1.0, 2.0, 3.0]), 0.1
STUCK = 13**0.5  # entries 2 and 3 never move
SPECS = (
    "powersgd(rank=1) + residual",
    "powersgd_plus(rank=1, refresh_period=10) + residual",
    "powersgd_plus(rank=1, refresh_period=10, refresh='randomized') + residual",
)


def distances(spec: str, steps: int, noise: float, seed: int = 0) -> list[float]:
    """Returns |X - A| before each step, and after the last, of gradient descent on |X - A|^2 / 2 from X = 0.

    The subspace starts as the first axis. noise: the deviation of normal noise on the gradient's diagonal at every step; it leaves the
    gradients diagonal, as noise of the data does where features never occur together."""
    cluster, generator = LocalCluster(spec, 1), np.random.default_rng(seed)
    driver = cluster.drivers[0]
    first = driver.grace.compressor.init(driver.ops, TensorSpec("X", TARGET.shape), driver.step_info())
    state = {f"{key}/X": np.asarray(array) for key, array in first.items()}
    state |= {"powersgd_q/X": np.array([1, 0, 0], np.float32), "residual/X": np.zeros(9, np.float32)}
    driver.load_state_dict({**driver.state_dict(), "state": state})
    x, found = np.zeros_like(TARGET), []
    for step in range(steps):
        found.append(float(np.linalg.norm(x - TARGET)))
        rate = RATE if noise == 0 else RATE / (1 + step / 50)  # noise needs a falling rate
        gradient = x - TARGET + noise * np.diag(generator.standard_normal(3))
        x = x - rate * np.asarray(cluster.step([{"X": gradient}])["X"], np.float64)
    return [*found, float(np.linalg.norm(x - TARGET))]


def run(quick: bool, progress: Progress) -> Outcome:
    steps, rows, checks, curves = 500 if quick else 2000, [], [], []
    for place, (spec, noise) in enumerate((spec, noise) for noise in (0.0, 0.1) for spec in SPECS):
        found = distances(spec, steps, noise)
        what = "exact gradients" if noise == 0 else f"noise of {noise:g}"
        rows.append([spec, what, found[-1]])
        if spec.startswith("powersgd("):
            checks.append(Check(f"{spec}, {what}: |X - A| stays within 0.1 of sqrt(13)", found[-1], abs(found[-1] - STUCK) < 0.1))
        else:
            limit = 1e-2 if noise == 0 and not quick else 0.1
            checks.append(Check(f"{spec}, {what}: |X - A| < {limit:g}", found[-1], found[-1] < limit))
        if noise == 0:
            curves.append(Curve(spec, list(range(0, steps + 1, 5)), found[::5]))
        progress((place + 1) / 6)
    return Outcome(["spec", "gradients", "|X - A| at the end"], rows, checks, curves, ("step", "|X - A|"))


EXPERIMENT = Experiment(
    "counterexample",
    "PowerSGD need not converge; PowerSGD+ does",
    "Xie, Chen, Yuan 2025 (PowerSGD+)",
    "PowerSGD does not always converge to the optimum, of which the paper has a counterexample; PowerSGD+, which computes the subspace "
    "anew from time to time, does.",
    "not available: the paper's construction could not be read; this one is ours",
    "f(X) = |X - A|^2 / 2, A = diag(1, 2, 3), one worker, rank 1, error feedback, the subspace starts as the first axis; exact gradients "
    "at rate 0.1, and gradients with normal noise on the diagonal at a falling rate; 2,000 steps.",
    "PowerSGD stays at |X - A| = sqrt(13) = 3.6056; PowerSGD+ gets below 0.01 with exact gradients, and below 0.1 with noise",
    0.1,
    run,
)
