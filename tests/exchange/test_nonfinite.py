"""If any gradient of any rank is not finite, every rank returns NaN for it, and no state changes in that step."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import grace_ext
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states

from .. import catalog

SHAPES = {"a": (40,), "empty": (0, 3), "m": (24, 18), "z": (7,)}
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def spoiled(gradients, rank: int, name: str, value: float):
    gradients = copy.deepcopy(gradients)
    gradients[rank][name].reshape(-1)[-1] = value
    return gradients


def check(world, spec: str, size: int, dtype: str, rank: int, name: str, value: float) -> None:
    g = grace_ext.grace(spec)
    cluster, skipped = world.cluster(g, size), world.cluster(g, size)
    world.step(cluster, inputs.ranks(size, 0, dtype, SHAPES))
    before = cluster.state_dict()
    held = states(cluster, world)
    good = inputs.ranks(size, 1, dtype, SHAPES)
    with np.errstate(all="ignore"):
        returned = world.everywhere(cluster, spoiled(good, rank, name, value))
    for out in returned:
        assert np.isnan(out[name].astype(np.float64)).all()
        assert {k: (v.shape, v.dtype) for k, v in out.items()} == {k: (v.shape, v.dtype) for k, v in good[0].items()}
        assert same_bits(out, returned[0])
        for other, array in out.items():  # every other tensor is NaN if it shares the bucket, otherwise finite
            nan = np.isnan(array.astype(np.float64))
            assert nan.all() or np.isfinite(array.astype(np.float64)).all(), other
    assert all(same_bits(a, b) for a, b in zip(held, states(cluster, world), strict=True))
    for one in before["ranks"]:
        one["step"] += 1
    assert [r["step"] for r in cluster.state_dict()["ranks"]] == [r["step"] for r in before["ranks"]]
    # The next step is as after any other skipped step.
    world.step(skipped, inputs.ranks(size, 5, dtype, SHAPES))
    skipped.load_state_dict(before)
    gradients = inputs.ranks(size, 2, dtype, SHAPES)
    assert same_bits(world.step(cluster, gradients), world.step(skipped, gradients))
    assert all(same_bits(a, b) for a, b in zip(states(cluster, world), states(skipped, world), strict=True))


@pytest.mark.parametrize("spec", [s for s in catalog.ALL if s not in catalog.PLAIN + catalog.FEEDBACK])
def test_other_communicators_and_memories(spec):
    """The step is skipped after an Inf in a vector on the last of three ranks."""
    check(NUMPY, spec, 3, "float32", 2, "a", np.inf)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("spec", ["topk(ratio=0.25) + residual", "fp16 + residual", "powersgd + residual", "signsgd + residual", "none"])
def test_every_kind_dtype_and_rank(world, spec, kind):
    """The step is skipped after NaN and both infinities, in each dtype, on the first and last rank, in a small and a large tensor."""
    for turn, dtype in enumerate(inputs.DTYPES):
        check(world, spec, 3, dtype, (0, 2)[turn % 2], ("a", "z")[turn // 2], BAD[kind])


def test_bad_on_two_ranks_at_once(world):
    """If one rank has Inf and another -Inf, all ranks still see that the step is not finite."""
    cluster = world.cluster(grace_ext.grace("topk(ratio=0.25) + residual"), 3)
    gradients = spoiled(spoiled(inputs.ranks(3, 0, "float32", SHAPES), 0, "a", np.inf), 2, "a", -np.inf)
    assert np.isnan(world.step(cluster, gradients)["a"]).all()
    assert all(not held for held in states(cluster, world))


def test_a_bad_first_step(world):
    """If the first step is not finite (loss scaling starts too high), it leaves no state, and training starts after it."""
    for spec in ("powersgd + residual", "topk + residual", "none", "efsignsgd + residual", "randomk + residual"):
        cluster, late = (world.cluster(grace_ext.grace(spec), 2) for _ in range(2))
        world.step(cluster, spoiled(inputs.ranks(2, 0, "float32", SHAPES), 1, "m", np.nan))
        for driver in late.drivers:
            driver.step = 1
        gradients = inputs.ranks(2, 1, "float32", SHAPES)
        assert same_bits(world.step(cluster, gradients), world.step(late, gradients)), spec


def test_an_empty_tensor_cannot_be_bad(world):
    """An empty tensor beside a tensor with NaN keeps its shape."""
    cluster = world.cluster(grace_ext.grace("topk + residual"), 2)
    out = world.step(cluster, spoiled(inputs.ranks(2, 0, "float32", SHAPES), 1, "m", np.nan))
    assert out["empty"].shape == (0, 3)
