"""Tests policies that depend on the step: what is sent when, and what happens to residuals, momenta and subspaces at a change."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY

from ..oracles import oracles

SHAPES = {"w": (24, 18), "v": (50,)}
W = TensorSpec("w", SHAPES["w"])


def run(world, policy, steps, size=2, seed=0):
    """Returns the results of each step, the cluster, and the gradients (exact in float32)."""
    cluster = world.cluster(grace_ext.grace(policy), size)
    gradients = []
    for step in range(steps):
        made = {name: inputs.grid(size, step, shape, seed) for name, shape in SHAPES.items()}
        gradients.append([{name: by_rank[rank] for name, by_rank in made.items()} for rank in range(size)])
    return [world.step(cluster, step) for step in gradients], cluster, gradients


def feedback(oracle_at, gradients, name):
    """Returns the aggregates of error feedback in float64 around the oracle of each step."""
    residuals = [np.zeros(SHAPES[name]) for _ in gradients[0]]
    out = []
    for step, by_rank in enumerate(gradients):
        p = [e + g[name].astype(np.float64) for e, g in zip(residuals, by_rank, strict=True)]
        aggregate, sent = oracle_at(step)(p)
        residuals = [x - s for x, s in zip(p, sent, strict=True)]
        out.append(aggregate)
    return out


def dense(p):
    return sum(p) / len(p), p


@pytest.mark.parametrize(
    ("policy", "oracle_at"),
    [
        ("warmup(steps=2, then=topk(ratio=0.1) + residual)", lambda t: dense if t < 2 else oracles.topk(0.1)),
        ("every(3, none, topk(ratio=0.1) + residual)", lambda t: oracles.topk(0.1) if t % 3 else dense),
        ("every(3, topk(ratio=0.1) + residual, none)", lambda t: dense if t % 3 else oracles.topk(0.1)),
        ("every(2, topk(ratio=0.3) + residual, topk(ratio=0.05) + residual)", lambda t: oracles.topk(0.05 if t % 2 else 0.3)),
        ("every(2, threshold(threshold=4) + residual, topk(ratio=0.05) + residual)",
         lambda t: oracles.topk(0.05) if t % 2 else oracles.threshold(4)),
        ("ratio_warmup(steps=4, stages=2, then=topk(ratio=0.125) + residual)",
         lambda t: oracles.topk(0.5 if t < 2 else 0.25 if t < 4 else 0.125)),
        ("warmup(steps=1, then=every(2, none, topk(ratio=0.1) + residual))", lambda t: oracles.topk(0.1) if t % 2 else dense),
    ],
)  # fmt: skip
def test_against_error_feedback_in_float64(world, policy, oracle_at):
    """The residual is kept at every change, and a dense step sends it: nothing is lost."""
    results, cluster, gradients = run(world, policy, 8)
    for name in SHAPES:
        for step, expected in enumerate(feedback(oracle_at, gradients, name)):
            assert np.abs(results[step][name] - expected).max() <= 1e-5, (name, step)


def test_sent_and_kept_add_up_over_all_changes():
    """After 11 steps, the sum of the results plus the mean residual equals the sum of the mean gradients, exactly."""
    policy = "every(3, none, every(2, topk(ratio=0.05) + residual, topk(ratio=0.2) + residual))"
    results, cluster, gradients = run(NUMPY, policy, 11)
    kept = sum(np.asarray(d.state["w"]["residual"], np.float64).reshape(SHAPES["w"]) for d in cluster.drivers) / 2
    got = sum(result["w"].astype(np.float64) for result in results) + kept
    assert np.array_equal(got, sum(g["w"].astype(np.float64) for step in gradients for g in step) / 2)


def test_a_dense_start_has_the_momentum_of_what_follows():
    """A dense warm-up before dgc is SGD with momentum on the mean gradient."""
    results, _, gradients = run(NUMPY, "warmup(steps=3, then=topk(ratio=0.1) + dgc(momentum=0.5))", 3)
    momentum = 0.0
    for step, by_rank in enumerate(gradients):
        momentum = 0.5 * momentum + sum(g["w"].astype(np.float64) for g in by_rank) / 2
        assert np.allclose(results[step]["w"], momentum, atol=1e-6)


def test_ratios_of_the_dgc_warm_up():
    """Ratios equal the authors' code for 5 stages, and their README's numbers for 4."""
    for stages, expected in ((5, (0.316, 0.1, 0.0316, 0.01, 0.00316, 0.001)), (4, (0.251, 0.063, 0.016, 0.004, 0.001))):
        g = grace_ext.grace(f"ratio_warmup(steps={10 * stages}, stages={stages}, then=topk(ratio=0.001) + residual)")
        for stage, ratio in enumerate(expected):
            for step in (10 * stage, 10 * stage + 9):
                found = g.parts_for(TensorSpec("w", (1000, 1000)), step)[0].ratio
                assert found == pytest.approx(ratio, rel=0.02), (stages, step)
        assert found == 0.001


@pytest.mark.parametrize("ranks", [(2, 5), (5, 2)])
def test_the_subspace_of_powersgd_is_carried_over(ranks):
    """Columns that both values of the knob `rank` have are kept; new ones are those of a first step, equal on all ranks."""
    first, second = ranks
    policy = f"every(1000, powersgd(rank={first}) + residual, powersgd(rank={second}) + residual)"
    _, cluster, gradients = run(NUMPY, policy, 1)
    before = [np.asarray(d.state["w"]["powersgd_q"]).reshape(first, 18).copy() for d in cluster.drivers]
    started = []
    kind = grace_ext.compressors.get("powersgd")
    original = kind._two_sums

    def watched(self, ops, x, spec, info, start, *more):
        started.append(np.asarray(start).reshape(-1, 18).copy())
        return original(self, ops, x, spec, info, start, *more)

    kind._two_sums = watched
    try:
        NUMPY.step(cluster, gradients[0])
    finally:
        kind._two_sums = original
    fresh = NUMPY.cluster(grace_ext.grace(f"powersgd(rank={second}) + residual"), 1)
    compressor, info = fresh.grace.compressor, fresh.drivers[0].step_info()
    drawn = np.asarray(compressor.init(NUMPY.ops, W, info)["powersgd_q"]).reshape(second, 18)
    common = min(ranks)
    assert len(started) == 2 and started[0].tobytes() == started[1].tobytes()
    assert np.array_equal(started[0][:common], before[0][:common]) and np.array_equal(before[0], before[1])
    assert np.array_equal(started[0][common:], drawn[common:])


def test_what_one_side_does_not_use_waits_for_the_other():
    """PowerSGD's Q stays unchanged during a step of another compressor."""
    _, cluster, gradients = run(NUMPY, "every(2, powersgd(rank=2) + residual, topk(ratio=0.1) + residual)", 1)
    left = np.array(cluster.drivers[0].state["w"]["powersgd_q"])
    NUMPY.step(cluster, gradients[0])
    assert np.array_equal(cluster.drivers[0].state["w"]["powersgd_q"], left)


@pytest.mark.parametrize(
    "policy",
    [
        "every(2, powersgd(rank=3) + residual, powersgd(rank=1) + residual)",
        "warmup(steps=3, then=qsgd(bits=4))",
        "ratio_warmup(steps=5, then=topk(ratio=0.02) + ef21)",
        "accordion(interval=2, threshold=0.1)",
        "by_size(min_elements=60, large=lgreco(every=3, window=2))",
    ],
)
def test_resumes_bit_for_bit_at_every_step(world, policy):
    results, _, gradients = run(world, policy, 8)
    for at in range(8):
        cluster = world.cluster(grace_ext.grace(policy), 2)
        for step in range(at):
            world.step(cluster, gradients[step])
        again = world.cluster(grace_ext.grace(policy), 2)
        again.load_state_dict(cluster.state_dict())
        for step in range(at, 8):
            got = world.step(again, gradients[step])
            assert all(got[name].tobytes() == results[step][name].tobytes() for name in SHAPES), (at, step)


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    """It changes neither compressor state nor what a policy has learnt; the step counter, and so the schedule, goes on."""
    policy = "accordion(interval=2, high=topk(ratio=0.2) + residual, low=topk(ratio=0.02) + residual)"
    _, cluster, gradients = run(NUMPY, policy, 3)
    before = cluster.state_dict()["ranks"][1]["state"]
    bad = [{name: g.copy() for name, g in by_rank.items()} for by_rank in gradients[0]]
    bad[0]["v"][3] = np.inf
    assert np.isnan(NUMPY.step(cluster, bad)["v"]).all()
    after = cluster.state_dict()["ranks"][1]
    assert after["step"] == 4 and all(np.array_equal(after["state"][key], before[key]) for key in before)


def test_a_state_that_does_not_fit_is_refused():
    _, cluster, gradients = run(NUMPY, "every(2, powersgd(rank=3) + residual, powersgd(rank=1) + residual)", 2)
    saved = cluster.state_dict()
    saved["ranks"][0]["state"]["powersgd_q/w"] = np.zeros(7, np.float32)
    again = NUMPY.cluster(grace_ext.grace("every(2, powersgd(rank=3) + residual, powersgd(rank=1) + residual)"), 2)
    NUMPY.step(again, gradients[0])
    with pytest.raises(grace_ext.GraceError, match="the state of 'w' has .*7.*expected"):
        again.load_state_dict(saved)
    with pytest.raises(grace_ext.GraceError, match="was saved with"):
        NUMPY.cluster(grace_ext.grace("every(3, powersgd(rank=3) + residual, powersgd(rank=1) + residual)"), 2).load_state_dict(saved)


def test_messages_say_what_was_chosen():
    """If ranks have chosen differently after all, the header differs, so that they raise an error instead of decoding wrongly."""
    _, cluster, gradients = run(NUMPY, "accordion(interval=100)", 1)
    regime = "policy:regime"
    cluster.drivers[1].state["w"][regime] = np.array([0, 0, 0], np.float32)
    with pytest.raises(grace_ext.errors.PayloadError, match="rank 1"):
        NUMPY.step(cluster, gradients[0])


@pytest.mark.parametrize(
    ("policy", "step"),
    [
        ("warmup(steps=2, then=topk(ratio=0.1) + residual)", 1),
        ("warmup(steps=2, then=topk(ratio=0.1) + residual @ broadcast)", 1),
        ("every(2, none, efsignsgd + residual)", 2),
        ("every(2, topk(ratio=0.1) + residual, none)", 1),
    ],
)
def test_dense_steps_are_summed_not_gathered(policy, step):
    """Dense steps use an all-reduce: a gather of whole gradients would send 32 times as much for 64 ranks."""
    g = grace_ext.grace(policy)
    assert [part.name for part in g.parts_for(W, step)] == ["none", "residual", "allreduce"]


@pytest.mark.parametrize("between", ["hierarchical", "hierarchical(between=allgather)", "reduce_scatter"])
def test_dense_steps_go_the_way_of_the_others_where_that_is_as_short(between):
    g = grace_ext.grace(f"warmup(steps=2, then=efsignsgd + residual @ {between})")
    assert str(g.parts_for(W, 1)[2]) == str(g.parts_for(W, 5)[2])


@pytest.mark.parametrize("policy", ["warmup(steps=2, then=topk + dgc)", "every(2, none, topk + dgc)"])
def test_dense_steps_of_float64_gradients_keep_the_memorys_float32(world, policy):
    cluster = world.cluster(grace_ext.grace(policy), 2)
    for step in range(4):
        given = [{"w": np.random.default_rng([step, rank]).standard_normal((60, 60))} for rank in range(2)]
        out = world.step(cluster, given)
        assert out["w"].dtype == np.float64


def test_a_pattern_said_twice_and_a_seed_inside_are_refused():
    with pytest.raises(grace_ext.errors.SpecSyntaxError, match=r"has 'a\*' twice"):
        grace_ext.grace("by_name({'a*': none, 'a*': fp16})")
    with pytest.raises(grace_ext.errors.GraceError, match="a spec inside a policy has no seed of its own"):
        grace_ext.grace({"policy": {"id": "by_size", "large": {"compressor": "randomk", "memory": "residual", "seed": 4}}})
