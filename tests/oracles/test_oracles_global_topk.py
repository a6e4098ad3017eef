"""Compares global_topk, which sends the largest elements of the whole model, with its equation in float64."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError, UnsupportedError
from grace_ext.testing import inputs
from grace_ext.testing.worlds import states

from . import oracles
from .test_oracles import RUNS, STEPS
from .test_oracles_sparse import count, largest, only


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("ratio", [0.1, 0.004, 1e-9, 1])
def test_global_topk(world, ratio, memory, size):
    """Each rank sends exactly the k largest elements of all tensors; ties go to the first parameter, then to the lowest position."""
    shapes = {"a": (40,), "b": (9, 7), "empty": (0,), "c": (1,), "d": (150,)}
    cluster = world.cluster(grace_ext.grace(f"global_topk(ratio={ratio}) + {memory}"), size)
    residual = [np.zeros(254)] * size
    k, cuts = count(ratio, 254), [40, 103, 103, 104]
    for step in range(STEPS):
        flat = inputs.grid(size, step, (254,), seed=3)
        given = [{n: part.reshape(shapes[n]) for n, part in zip(shapes, np.split(x, cuts), strict=True)} for x in flat]
        got = world.step(cluster, given)
        p = [x + (e if memory == "residual" else 0) for x, e in zip(flat, residual, strict=True)]
        sent = [only(x.astype(float), largest(x, k)) for x in p]
        assert all(np.count_nonzero(s) == k for s in sent)
        residual = [x - s for x, s in zip(p, sent, strict=True)]
        whole = np.concatenate([got[name].reshape(-1) for name in shapes])
        assert np.allclose(whole, oracles.mean(sent), rtol=0 if size != 3 else 2e-7, atol=0)
    if memory == "residual":
        for rank, held in enumerate(states(cluster, world)):
            kept = np.concatenate([held[f"residual/{name}"] for name in shapes if name != "empty"])
            assert np.array_equal(kept, residual[rank])


def test_global_topk_ties_and_tensors_that_send_nothing(world):
    """If all magnitudes are equal, the first parameter's first elements are sent; larger values in one tensor leave none for another."""
    g = grace_ext.grace("global_topk(ratio=0.25) + none")
    out = world.step(world.cluster(g, 1), [{"z": np.full(6, -2, np.float32), "a": np.full(10, 2, np.float32)}])
    assert np.flatnonzero(out["z"]).tolist() == [0, 1, 2, 3] and not out["a"].any()
    out = world.step(world.cluster(g, 2), [{"z": np.ones(6, np.float32), "a": np.full(10, 2, np.float32)}] * 2)
    assert not out["z"].any() and np.flatnonzero(out["a"]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["global_topk(ratio=0.1) > fp16 + residual", "global_topk(ratio=0.1) + residual @ sparse_allreduce"])
def test_global_topk_elsewhere(world, text):
    """A pipeline's selection and another communicator make the same choice (the grid's values are exact in float16)."""
    here, there = (world.cluster(grace_ext.grace(t), 2) for t in ("global_topk(ratio=0.1) + residual", text))
    for step in range(3):
        given = [{"a": a, "b": b} for a, b in zip(inputs.grid(2, step, (50,)), inputs.grid(2, step, (9, 7), seed=9), strict=True)]
        a, b = world.step(here, given), world.step(there, given)
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_the_whole_model_is_one_bucket(world):
    """The whole model is one bucket, for any `bucket_bytes`; if a framework makes several, an error says what to do."""
    for text in ("global_topk", "global_topk > qsgd(bits=4)"):
        cluster = world.cluster(grace_ext.grace(f"{text} + residual"), 2)
        for driver in cluster.drivers:
            driver.bucket_bytes = 8
        world.step(cluster, inputs.ranks(2, 0))
        (driver, _) = cluster.drivers
        assert len(driver.buckets) == 1
        with pytest.raises(UnsupportedError, match="bucket_cap_mb"):
            driver.regroup([[name] for name in driver.specs])
        with pytest.raises(IncompatiblePartsError):
            grace_ext.grace(f"{text} + residual @ reduce_scatter")
