"""Searches over models and k-fold loops end flat: 50 of each wrapper are made, used and dropped in real jobs."""

from __future__ import annotations

import sys
import weakref

import numpy as np
import pytest

import grace_ext
from grace_ext.local.cluster import LocalSGDCluster
from grace_ext.testing.worlds import WORLDS

from .support.flat import MODEL, assert_flat
from .test_jobs import cases_of, held

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

JOBS = [("torchrun", "flat_job.py"), ("horovodrun", "flat_job.py"), ("horovodrun", "flat_tf_job.py"), ("mpirun", "flat_mpi_job.py")]
CASES = [(engine, file, case) for engine, file in JOBS for case in cases_of(file)]


@pytest.mark.parametrize(("engine", "file", "case"), CASES)
def test_wrappers(engine, file, case):
    assert case in held(engine, 2, file)


SPEC = "topk(ratio=0.01) + residual"
TENSORS = [{"w": np.ones(MODEL // 4, np.float32)}] * 2


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_clusters(world):
    def use():
        cluster = world.cluster(grace_ext.grace(SPEC), 2)
        for _ in range(2):
            world.step(cluster, TENSORS)
        return weakref.ref(cluster)

    assert_flat(use)


def test_clusters_of_local_training():
    def use():
        cluster = LocalSGDCluster(SPEC, 2, every=1)
        cluster.start(TENSORS)
        cluster.gradients(TENSORS)
        cluster.step(TENSORS)
        return weakref.ref(cluster)

    assert_flat(use)
