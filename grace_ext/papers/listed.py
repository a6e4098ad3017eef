"""Lists the experiments that need the package alone, by name."""

from __future__ import annotations

from . import counterexample, ef_star, inversion, linear_speedup, logistic, membership, qsparse
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        logistic.FIGURE_1, logistic.EXTREME, ef_star.EXPERIMENT, linear_speedup.EXPERIMENT, counterexample.EXPERIMENT,
        qsparse.EXPERIMENT, inversion.EXPERIMENT, membership.EXPERIMENT,
    )
}  # fmt: skip
