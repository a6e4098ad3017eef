"""Lists the experiments that need the package alone, by name, those of one paper together."""

from __future__ import annotations

from . import (
    accordion,
    counterexample,
    ef_star,
    inversion,
    lgreco,
    linear_speedup,
    logistic,
    lqsgd,
    membership,
    no_feedback,
    plus_text,
    powersgd,
    qsparse,
    time_to_target,
    volumes,
    which_momentum,
)
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        logistic.FIGURE_1, logistic.EXTREME, ef_star.EXPERIMENT, volumes.IMAGES, volumes.TEXT, no_feedback.EXPERIMENT,
        which_momentum.EXPERIMENT, accordion.EXPERIMENT, linear_speedup.EXPERIMENT, powersgd.EXPERIMENT, time_to_target.EXPERIMENT,
        counterexample.EXPERIMENT, plus_text.EXPERIMENT, lqsgd.EXPERIMENT, lgreco.FAMILIES, lgreco.WITH_ACCORDION, qsparse.EXPERIMENT,
        inversion.EXPERIMENT, membership.EXPERIMENT,
    )
}  # fmt: skip
