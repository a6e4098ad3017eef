"""Makes and drops 50 of each wrapper over MPI, on any number of ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
import types
import weakref
from pathlib import Path

import numpy as np

import grace_ext.frameworks.numpy as gnp

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import run_cases  # noqa: E402
from flat import MODEL, assert_flat  # noqa: E402

from mpi4py import MPI  # isort: skip  # noqa: E402

SPEC = "topk(ratio=0.01) + residual"


def gradients():
    return {"w": np.ones(MODEL // 4, np.float32)}


def case_exchange():
    """Some are closed, some are dropped."""
    made = []

    def use():
        exchange = gnp.Exchange(SPEC, simulate=True)
        for _ in range(2):
            exchange.step(gradients())
        made.append(1)
        if len(made) % 2:
            exchange.close()
        return weakref.ref(exchange)

    assert_flat(use)


def case_local_sgd():
    def use():
        local = gnp.LocalSGD(SPEC, every=2, simulate=True)
        weights = local.start(gradients())
        for _ in range(3):
            weights = local.step(weights)
        return weakref.ref(local)

    assert_flat(use)


if __name__ == "__main__":
    world = MPI.COMM_WORLD
    run_cases(types.SimpleNamespace(rank=world.Get_rank, allgather_object=world.allgather), globals())
