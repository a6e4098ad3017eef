"""The memory that a driver holds does not grow from step to step."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

import grace_ext

SIZE = 50_000


def held_after(cluster: grace_ext.LocalCluster, steps: int) -> int:
    """Makes more steps. Returns the bytes in use after them."""
    for step in range(steps):
        gradients = [
            {"w": np.random.default_rng(2 * step + rank).standard_normal((SIZE // 100, 100)).astype(np.float32)} for rank in range(2)
        ]
        cluster.step(gradients, lr=0.1)
    del gradients
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(
    "spec", ["topk + residual", "powersgd + residual", "qsgd + diana", "topk + ef21", "topk + gradient_compression", "none"]
)
def test_memory_is_flat(spec):
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 2)
    tracemalloc.start()
    try:
        before = held_after(cluster, 6)
        assert held_after(cluster, 12) - before < 4 * SIZE  # less than one array more in twelve steps of two ranks
    finally:
        tracemalloc.stop()
