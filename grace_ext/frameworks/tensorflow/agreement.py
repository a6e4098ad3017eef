"""Checks that the ranks of a DistributedOptimizer have not diverged."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from .optimizer import _Distributed
from .variables import shared_variables


def check_agreement(optimizer: Any, model: Any = None) -> None:
    """Raises DisagreementError on every rank alike, naming ranks and variables, if the ranks' specs, variables' names, shapes, versions
    or steps differ, or the bits of the variables: those that this DistributedOptimizer trains, or with `model` all of the model's
    (the moving averages of BatchNormalization differ by rank).

    Every rank of its process set calls it between steps, after the first (else GraceError), outside tf.function. It waits for the
    slowest rank, reads every variable once and gathers about 30 bytes per variable. At world size 1 it does nothing. For `fit`, see
    callbacks.AgreementCallback. The states of seed generators, which differ by rank on purpose, are left out."""
    if not isinstance(optimizer, _Distributed):
        raise UnsupportedError(f"check_agreement takes what grace_ext's DistributedOptimizer returns, not {type(optimizer).__name__}")
    optimizer._grace.compare(optimizer._trainable_variables if model is None else shared_variables(model))
