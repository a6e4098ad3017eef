"""Bugs of GRACE that no other test file covers, by their numbers in docs/porting-from-grace.md, do not occur."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import sampling
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY


def test_its_tensorflow_forms(world):
    """Bug 16: in GRACE's TensorFlow forms, fp16 adds a leading dimension, broadcast never averages, randomk draws an index beyond the end,
    signs are divided by the number of ranks, and PowerSGD applies momentum internally, and twice."""
    gradients = [{"w": g} for g in inputs.grid(3, 0, (24, 18))]
    mean = sum(g["w"].astype(np.float64) for g in gradients) / 3
    out = world.step(world.cluster(grace_ext.grace("fp16 + none"), 3), gradients)["w"]
    assert out.shape == (24, 18) and np.allclose(out, mean, rtol=1e-3, atol=1e-3)
    out = world.step(world.cluster(grace_ext.grace("topk(ratio=1) + none @ broadcast"), 3), gradients)["w"]
    assert np.allclose(out, mean, rtol=1e-6)
    signs = world.step(world.cluster(grace_ext.grace("signsgd + none"), 3), gradients)["w"]
    assert np.array_equal(signs, np.sign(sum(np.sign(g["w"]) for g in gradients)))
    cluster = world.cluster(grace_ext.grace("powersgd(rank=18) + none"), 3)
    for _ in range(3):  # with full rank, the result is this step's mean, without momentum
        assert np.allclose(world.step(cluster, gradients)["w"], mean, atol=1e-4)


def test_random_positions_stay_inside():
    """Bugs 16 and 11: over many steps on a small tensor every position is below d, and the last one is drawn, too."""
    drawn = {int(p) for step in range(300) for p in sampling.sample((step, 7), 5, 2)}
    assert drawn == set(range(5))


@pytest.mark.parametrize("spec", ["threshold(threshold=1.0) + residual", "dgc + residual", "topk(ratio=0.1) + residual @ broadcast"])
def test_tensors_are_told_apart_by_name_not_by_the_order_of_calls(spec):
    """Bug 23: gradients that arrive in a different order on each rank are paired correctly, even if sizes vary."""
    shapes = {"a": (40,), "b": (24, 18), "c": (7,)}
    gradients = inputs.ranks(2, 0, shapes=shapes)
    expected = NUMPY.step(NUMPY.cluster(grace_ext.grace(spec), 2), gradients)
    shuffled = [gradients[0], dict(reversed(gradients[1].items()))]
    got = NUMPY.step(NUMPY.cluster(grace_ext.grace(spec), 2), shuffled)
    assert all(np.array_equal(got[name], expected[name]) for name in shapes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_decoded_dtype_is_the_gradients(dtype):
    """Bug 25: GRACE's decompress always returns float32, it has no state to save, and does not handle NaN (see test_nonfinite.py)."""
    for text in ("topk(ratio=0.1)", "qsgd", "efsignsgd", "powersgd"):
        gradients = inputs.ranks(2, 0, dtype, {"w": (24, 18)})
        cluster = NUMPY.cluster(grace_ext.grace(f"{text} + residual"), 2)
        assert NUMPY.step(cluster, gradients)["w"].dtype == gradients[0]["w"].dtype
        assert any(key.startswith("residual/") for key in cluster.state_dict()["ranks"][0]["state"])
