"""If any gradient of any rank is not finite, every rank returns NaN for it, and no state changes in that step."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import LearningRateError
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


@pytest.mark.parametrize(
    ("spec", "dtype", "value"),
    [
        ("none + gradient_compression", "f4", 3e38),
        ("none + momentum_compression", "f8", 3e38),
        ("none + gradient_compression", "f8", 1e300),
        ("demo(topk=32) + residual", "f4", 3e38),
        ("accordion(high=none, low=none, interval=100)", "f4", 1.5e38),
        ("lgreco(base=topk(ratio=0.5) + none, every=300, window=300)", "f4", 1.5e38),
        ("none + ef21 @ allgather", "f4", -3e38),
        ("topk(ratio=0.5) + efsignsgd", "f4", 3e38),
        ("vqsgd(repeats=1) + residual", "f4", 1e37),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_leaves_the_range_is_not_kept(spec, dtype, value):
    """Finite gradients whose momentum, mean or transform float32 cannot hold are a step that is skipped; the state stays finite."""
    cluster, draw = grace_ext.LocalCluster(grace_ext.grace(spec), 2), np.random.default_rng(0)
    for step in range(4):
        before = states(cluster, NUMPY)
        signs = draw.choice([-1.0, 1.0], (24, 18)) if "demo" in spec else np.ones((24, 18))
        out = cluster.step([{"w": (value * signs).astype(dtype)}] * 2, lr=0.5)["w"]
        held = states(cluster, NUMPY)
        assert all(np.isfinite(x).all() for rank in held for x in rank.values()), step
        assert np.isfinite(out).all() or (np.isnan(out).all() and (not step or _same(before, held))), step
    out = cluster.step([{"w": np.ones((24, 18), dtype)}] * 2, lr=0.5)["w"]
    assert np.isfinite(out).all()


def _same(one, other) -> bool:
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True))


#: Memories and communicators that use the learning rate.
BY_RATE = ["topk(ratio=0.25) + efsignsgd", "topk(ratio=0.25) + cser", "efsignsgd + dist_ef_block(momentum=0.5)",
           "efsignsgd + dist_ef_block @ reduce_scatter(follow_rate=True)"]  # fmt: skip


@pytest.mark.parametrize("spec", BY_RATE)
@pytest.mark.parametrize("rate", [0.0, 1e-40, 1e-31])
def test_a_rate_of_nothing_sends_nothing(spec, rate):
    """A step whose learning rate is 0, or so low that float32 cannot hold its products, returns zeros and keeps the state."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 2)
    cluster.step(inputs.ranks(2, 0), lr=0.1)
    before = states(cluster, NUMPY)
    for out in NUMPY.everywhere(cluster, inputs.ranks(2, 1), lr=rate):
        assert not any(array.any() for array in out.values())
    assert _same(before, states(cluster, NUMPY))
    assert all(np.isfinite(x).all() for x in NUMPY.step(cluster, inputs.ranks(2, 2), lr=0.1).values())


@pytest.mark.parametrize("spec", BY_RATE)
@pytest.mark.parametrize("rate", [float("inf"), -0.1])
def test_a_rate_that_cannot_be_is_an_error(spec, rate):
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 2)
    cluster.step(inputs.ranks(2, 0), lr=0.1)
    before = states(cluster, NUMPY)
    with pytest.raises(LearningRateError, match=f"finite and not negative, got {rate}"):
        cluster.step(inputs.ranks(2, 1), lr=rate)
    assert _same(before, states(cluster, NUMPY))


@pytest.mark.parametrize("spec", BY_RATE)
def test_a_rate_that_falls_by_thirty_powers_of_ten(spec):
    """What was kept at a high rate is large at a low one; the results are finite, or the step is skipped."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 2)
    for step, rate in enumerate((1e6, 1e-29, 1e-29, 0.1)):
        before = states(cluster, NUMPY)
        outs = NUMPY.everywhere(cluster, inputs.ranks(2, step), lr=rate)
        held = states(cluster, NUMPY)
        assert all(np.isfinite(x).all() for rank in held for x in rank.values())
        if not all(np.isfinite(x).all() for out in outs for x in out.values()):
            assert _same(before, held)
