"""Cases of gnp.LocalSGD over MPI. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import grace_ext.frameworks.numpy as gnp
from grace_ext.errors import DisagreementError, GraceError, NamesError
from grace_ext.local import post_local

from mpi4py import MPI  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.frameworks.support.cases import assert_same, raises, run_cases  # noqa: E402
from tests.local import problem  # noqa: E402

COMM = MPI.COMM_WORLD
QSPARSE = "topk(ratio=0.2) > qsgd(bits=4) + residual"

LEARNING = "accordion(high=lgreco(base=topk(ratio=0.2) + residual, every=2, window=1, high=2), low=topk(ratio=0.1) + residual, interval=2)"


class Engine:
    """Provides the functions of an engine that run_cases needs."""

    @staticmethod
    def allgather_object(value):
        return COMM.allgather(value)

    @staticmethod
    def rank():
        return COMM.rank


def train(spec, steps, local=None, weights=None, **options):
    if local is None:
        local = gnp.LocalSGD(spec, COMM, **options)
    weights = local.start(problem.initial(np.float32) if weights is None else weights)
    for step in steps:
        own = {n: g.astype(np.float32) for n, g in problem.gradient(weights, COMM.rank, step).items()}
        given = local.gradients(own, lr=problem.LR)
        weights = local.step({n: (w - problem.LR * given[n]).astype(np.float32) for n, w in weights.items()})
    return weights, local


def same_on_all_ranks(weights):
    return len(set(COMM.allgather(b"".join(w.tobytes() for w in weights.values())))) == 1


def case_the_clusters_bits():
    for spec, options in (
        (QSPARSE, {"every": 3}),
        (QSPARSE, {"schedule": post_local(start=3, every=3), "outer_lr": 0.7, "outer_momentum": 0.9}),
        ("topk(ratio=0.2) + cser(reset_period=4)", {}),
        ("none", {"every": 4}),
        (LEARNING, {"every": 1}),
        ("by_name({'b': topk(ratio=0.4) + residual}, default=topk(ratio=0.1) + residual)", {"every": 3}),
    ):
        weights, local = train(spec, range(10), **options)
        models, _ = problem.in_cluster(spec, COMM.size, 10, dtype=np.float32, **options)
        if spec == "none" or "schedule" in options:  # MPI adds three numbers in its own order
            assert all(np.allclose(weights[n], models[COMM.rank][n], atol=1e-6) for n in weights), (spec, options)
        else:
            assert_same(weights, models[COMM.rank])
        assert same_on_all_ranks(local.sync(weights))


def case_asynchronous():
    for spec in (QSPARSE, f"warmup(steps=3, then={QSPARSE})"):
        check_asynchronous(spec)


def check_asynchronous(spec):
    weights, local = train(spec, range(8 + 2 * COMM.rank), every=2 + COMM.rank, asynchronous=True)
    raises(GraceError, "call sync()", local.state_dict)
    weights = local.sync(weights)
    assert same_on_all_ranks(weights)
    assert all(np.abs(w - problem.initial()[n]).max() > 0.05 for n, w in weights.items())


def case_resume():
    straight, _ = train(QSPARSE, range(9), every=3, outer_lr=0.7, outer_momentum=0.9)
    weights, local = train(QSPARSE, range(4), every=3, outer_lr=0.7, outer_momentum=0.9)
    saved = local.state_dict()
    # Ranks start with different models, as they were saved.
    again = gnp.LocalSGD(QSPARSE, COMM, every=3, outer_lr=0.7, outer_momentum=0.9)
    again.load_state_dict(saved)
    weights, _ = train(QSPARSE, range(4, 9), again, weights)
    assert_same(weights, straight)


def case_use():
    local = gnp.LocalSGD("none", COMM)
    raises(GraceError, "call start", lambda: local.step({"w": 1.0}))
    raises(DisagreementError, "another model than rank 0", lambda: local.start({"w": np.ones(2) * COMM.rank}))
    local = gnp.LocalSGD("none", COMM, every=2)
    local.start({"w": np.ones(2)})
    raises(NamesError, "they started as", lambda: local.step({"v": np.ones(2)}))
    raises(GraceError, "has begun with other weights", lambda: local.start({"w": np.zeros(2)}))
    local = gnp.LocalSGD("none", COMM, every=1)
    local.start({"w": np.ones(2)})
    raises(GraceError, "call gradients", lambda: local.step({"w": np.ones(2)}))


run_cases(Engine, globals())
