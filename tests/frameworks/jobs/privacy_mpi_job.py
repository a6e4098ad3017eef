"""Cases of privacy in the numpy Exchange over MPI, on any number of ranks. Prints 'CASE name ok' for each case that holds on all."""

from __future__ import annotations

import math

import numpy as np
from mpi_setup import RANK, SIZE, TOPK, Ranks, everyones, exchange, gradients

import grace_ext
import grace_ext.frameworks.numpy as gnp
from grace_ext.errors import DisagreementError, UnsupportedError
from grace_ext.privacy import Privacy

from cases import assert_same, raises, run_cases  # isort: skip

NOISELESS = Privacy(clip=0.5, noise_multiplier=0)


def case_it_equals_a_local_cluster():
    with exchange(TOPK, privacy=NOISELESS) as ours:
        cluster = grace_ext.LocalCluster(TOPK, SIZE, privacy=NOISELESS)
        for step in range(3):
            assert_same(ours.step(gradients(RANK, step)), cluster.step(everyones(step)))


def case_a_gradient_that_is_not_finite_counts_as_zero():
    mine = gradients(RANK, 0)
    if RANK == 0:
        mine["bias"][2] = np.nan
    with exchange("none", privacy=NOISELESS) as ours:
        got = ours.step(mine)
        total = math.sqrt(sum(float(np.square(x.astype("f8")).sum()) for x in got.values()))
        assert all(np.isfinite(x.astype("f8")).all() for x in got.values()) and total <= 0.5 * (SIZE - 1) / SIZE * 1.01


def case_a_rank_alone_is_protected_too():
    """Also without `simulate`, where a rank alone exchanges nothing."""
    with gnp.Exchange("none", privacy=Privacy(clip=1, noise_multiplier=3)) as ours:
        got = ours.step({"w": np.zeros(100_000, np.float32)})["w"]
        assert abs(float(got.std()) * math.sqrt(SIZE) / 3 - 1) < 0.02
        assert math.isclose(ours.epsilon(1e-5), Privacy(noise_multiplier=3).epsilon(1e-5, 1))


def case_ranks_must_agree_on_it():
    if SIZE > 1:
        with exchange("none", privacy=Privacy(clip=1 + RANK)) as ours:
            raises(DisagreementError, "gaussian", lambda: ours.step(gradients(RANK, 0)))


def case_what_is_refused():
    raises(UnsupportedError, "Exchange gets one gradient per rank", lambda: exchange("gaussian(unit='example', batch=2) | none"))
    raises(UnsupportedError, "LocalSGD makes steps", lambda: gnp.LocalSGD("gaussian | none", every=2))


run_cases(Ranks, globals())
