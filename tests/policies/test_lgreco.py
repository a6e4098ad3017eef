"""Tests L-GreCo in training: when and what it decides, and that all ranks decide alike."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest

import grace_ext
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing.worlds import NUMPY

SHAPES = {"large": (120, 90), "flat": (60, 50), "small": (30,)}


def gradients(step, size=2):
    """Returns gradients per rank: a tensor with a few large entries, one of weak noise, and a small one with large entries."""
    made = []
    for rank in range(size):
        draw = np.random.default_rng([step, rank])
        made.append({
            "large": (draw.standard_normal((120, 90)) * (np.random.default_rng(1).random((120, 90)) < 0.005)).astype(np.float32),
            "flat": (0.01 * draw.standard_normal((60, 50))).astype(np.float32),
            "small": draw.standard_normal(30).astype(np.float32),
        })  # fmt: skip
    return made


def settings(cluster):
    return [{name: float(d.state[name]["policy:setting"][0]) for name in d.state} for d in cluster.drivers]


def test_decides_at_the_end_of_each_period_and_all_ranks_change_at_the_same_step(world):
    """The choice is uniform until the first solution; all ranks use the new one from the next step on, in every period."""
    cluster = world.cluster(grace_ext.grace("lgreco(every=4, window=2, base=topk(ratio=0.01) + residual)"), 2)
    uniform, sizes, seen = cluster.grace.policy.uniform, [], []
    for step in range(12):
        world.step(cluster, gradients(step))
        seen.append(settings(cluster))
        sizes.append(cluster.wire_bytes)
        assert seen[-1][0] == seen[-1][1]
    assert all(set(seen[step][0].values()) == {uniform} for step in range(3))
    assert seen[3] != seen[2] and seen[4] == seen[5] == seen[6] == seen[3]
    assert sizes[0] == sizes[1] == sizes[2] and sizes[3][0] > sizes[2][0]  # the errors travel with the fourth step
    assert sizes[4] == sizes[5] == sizes[6] < sizes[0]


@pytest.mark.parametrize("error", ["norm", "adam"])
def test_the_decision_is_the_best_of_all_for_the_last_window(world, error):
    """The decision equals brute force in float64 on the mean of the ranks' errors, each for its own sum of the window's gradients."""
    text = f"lgreco(every=5, window=3, base=topk(ratio=0.05) + residual, choices=4, low=0.2, high=5, error={error})"
    cluster = world.cluster(grace_ext.grace(text), 2)
    sums = {name: np.zeros((2, *shape)) for name, shape in SHAPES.items()}
    for step in range(5):
        by_rank = gradients(step)
        world.step(cluster, by_rank)
        for name, rank in itertools.product(SHAPES, range(2)) if step >= 2 else ():
            sums[name][rank] += by_rank[rank][name].astype(np.float64)
    policy = cluster.grace.policy
    errors, sizes = {}, {}
    for name, ranks in sums.items():
        spec = TensorSpec(name, SHAPES[name])
        ordered = np.sort(np.abs(ranks.reshape(2, -1)), axis=1)[:, ::-1]
        counts = [max(1, math.ceil(v * spec.size - 1e-9)) for v in policy.values]
        dense = [leaf.parts_for(spec)[0].name == "none" for leaf in policy.leaves]
        lost = [np.linalg.norm(ordered[:, k:], axis=1) for k in counts]
        norms = np.linalg.norm(ordered, axis=1)
        counted = lost if error == "norm" else [math.sqrt(spec.size) * (norms - np.sqrt(norms**2 - each**2)) for each in lost]
        errors[name] = [0.0 if d else float(each.mean()) for each, d in zip(counted, dense, strict=True)]
        sizes[name] = [leaf.nbytes(spec) for leaf in policy.leaves]
    budget = sum(e[policy.uniform] for e in errors.values())
    combinations = itertools.product(range(len(policy.values)), repeat=3)
    allowed = [c for c in combinations if sum(errors[n][i] for n, i in zip(SHAPES, c, strict=True)) <= budget * (1 - 3e-4)]
    best = min(sum(sizes[n][i] for n, i in zip(SHAPES, c, strict=True)) for c in allowed)
    chosen = settings(cluster)[1]
    assert sum(sizes[name][int(chosen[name])] for name in SHAPES) == best < sum(sizes[n][policy.uniform] for n in SHAPES)
    assert sum(errors[name][int(chosen[name])] for name in SHAPES) <= budget * (1 + 1e-6)


def test_what_adam_loses_keeps_large_layers_of_small_gradients():
    """By the 2-norm, errors of a large tensor with small gradients hardly count beside a small tensor with large ones, but Adam steps
    equally far in both."""
    draw = np.random.default_rng(0)
    x = {"large": draw.standard_normal(10_000).astype(np.float32), "small": 3 * draw.standard_normal(100).astype(np.float32)}
    sent = {}
    for error in ("norm", "adam"):
        cluster = NUMPY.cluster(grace_ext.grace(f"lgreco(every=2, window=1, error={error}, base=topk(ratio=0.01) + residual)"), 2)
        for _ in range(3):
            NUMPY.step(cluster, [x, x])
        sent[error] = cluster.grace.policy.values[int(settings(cluster)[0]["large"])]
    assert sent["norm"] < 0.005 and sent["adam"] == 0.01


def test_a_budget_that_cannot_be_kept_leaves_the_uniform_choice_and_says_so(caplog):
    cluster = NUMPY.cluster(grace_ext.grace("lgreco(every=2, window=1, alpha=1e-3, high=2, base=topk(ratio=0.1) + residual)"), 2)
    with caplog.at_level(logging.WARNING, "grace_ext"):
        for step in range(3):
            NUMPY.step(cluster, gradients(step))
    assert ["no choice keeps the errors within alpha=0.001" in r.getMessage() for r in caplog.records] == [True]
    assert {v for s in settings(cluster) for v in s.values()} == {cluster.grace.policy.uniform}


@pytest.mark.parametrize(
    ("base", "least", "most"),
    [
        ("powersgd(rank=1) + residual", 1, 4),
        ("powersgd(rank=4) + residual", 2, 16),
        ("qsgd(bits=2)", 2, 4),
        ("qsgd(bits=8)", 4, 16),
        ("natural", 8, 9),
        ("topk(ratio=0.01) + residual", 0.003, 1),
        ("topk(ratio=0.5) + residual", 0.15, 1),
        ("topk(ratio=0.01) > qsgd(bits=4) + residual", 0.003, 1),
    ],
)
def test_the_choices_never_drop_a_layer(base, least, most):
    """Bug 34: the authors' code can choose rank 0. Here no choice is empty, and the base's own value is among them exactly once."""
    policy = grace_ext.grace(f"lgreco(base={base})").policy
    assert policy.values[0] == pytest.approx(least) and policy.values[-1] == pytest.approx(most)
    assert list(policy.values) == sorted(set(policy.values)) and len(policy.values) <= 10
    assert policy.leaves[policy.uniform] == policy.base
    for leaf in policy.leaves:
        assert leaf.nbytes(TensorSpec("w", (20, 20))) > 0


def test_warm_state_is_kept_over_a_change_of_rank():
    """Residual and subspace are kept, and new columns come from a shared seed: ranks stay equal, and no gradient is lost."""
    cluster = NUMPY.cluster(grace_ext.grace("lgreco(every=2, window=1, alpha=1.2, base=powersgd(rank=4) + residual)"), 2)
    total, sent, changed = 0.0, 0.0, {}
    for step in range(9):
        by_rank = gradients(step)
        out = NUMPY.everywhere(cluster, by_rank)
        assert all(out[0][name].tobytes() == out[1][name].tobytes() for name in SHAPES)
        total, sent = total + sum(g["large"].astype(np.float64) for g in by_rank) / 2, sent + out[0]["large"].astype(np.float64)
        changed = changed or (settings(cluster)[0] if step == 1 else {})
    assert len(set(changed.values())) > 1
    kept = sum(np.asarray(d.state["large"]["residual"], np.float64).reshape(120, 90) for d in cluster.drivers) / 2
    assert np.abs(sent + kept - total).max() <= 1e-4


def test_a_window_with_a_step_that_was_not_finite():
    """After a step that was not finite the sum starts again; a solution due at such a step waits for the next period."""
    cluster, first = NUMPY.cluster(grace_ext.grace("lgreco(every=3, window=2)"), 2), {}
    for step in range(7):
        by_rank = gradients(step)
        if step in (1, 5):
            by_rank[1]["flat"][0, 0] = np.nan
        NUMPY.step(cluster, by_rank)
        if step == 5:
            assert settings(cluster)[0] == first
        if step == 2:
            first = settings(cluster)[0]
            assert set(first.values()) != {float(cluster.grace.policy.uniform)}


def test_every_tensor_dense_has_nothing_to_decide():
    cluster = NUMPY.cluster(grace_ext.grace("lgreco(every=1, window=1, base=powersgd(rank=2) + residual)"), 2)
    for step in range(3):
        out = NUMPY.step(cluster, [{"b": g["small"]} for g in gradients(step)])
    assert np.allclose(out["b"], (gradients(2)[0]["small"] + gradients(2)[1]["small"]) / 2)


@pytest.mark.parametrize(
    "base",
    [
        "sidco(ratio=0.05) + residual", "wangni(ratio=0.05)", "global_topk(ratio=0.05) + residual", "atomo(rank=4)",
        "powersgd_plus + residual",
    ],
)  # fmt: skip
def test_payloads_of_any_size_are_priced_by_what_they_are_expected_to_be(base):
    """Choices are priced by expected sizes: upper bounds do not depend on the knob here, or exceed dense for all choices."""
    cluster = NUMPY.cluster(grace_ext.grace(f"lgreco(base={base}, every=4, window=2)"), 2)
    draw, sent = np.random.default_rng(0), []
    decay = 0.8 ** np.arange(80)
    for _ in range(8):
        made = [((draw.standard_normal((120, 80)) * decay) @ draw.standard_normal((80, 80))).astype("f4") for _ in range(6)]
        NUMPY.step(cluster, [{f"w{i}": made[3 * rank + i] for i in range(3)} for rank in range(2)])
        sent.append(cluster.wire_bytes[0])
    assert sent[5] <= 1.3 * sent[1] and sent[5] < 3 * 120 * 80 * 4 / 2, sent


@pytest.mark.parametrize("scale", [1e18, 1e-25])
def test_gradients_of_any_size_have_errors(scale):
    """Errors are right even if the squares of the gradients overflow or underflow float32."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((300, 20)).astype(np.float32)
    policy = grace_ext.grace("lgreco(base=powersgd(rank=2) + residual)").policy
    spec = TensorSpec("w", x.shape)
    plain, scaled = (policy.errors(NUMPY.ops, spec, (x * np.float32(s)).reshape(-1)) for s in (1.0, scale))
    assert np.allclose(np.array(scaled) / scale, plain, rtol=1e-4)


def test_rounding_alone_is_no_budget_that_cannot_be_kept():
    """With alpha=1 the budget is the base's own error sum, so rounding must not make the base exceed it."""
    policy = grace_ext.grace("lgreco(base=topk(ratio=0.05) + residual, high=1, choices=2)").policy
    specs = [TensorSpec(f"w{i}", (100, 100)) for i in range(7)]
    assert policy.solve({spec: [2.0 + i / 7, 1.0 + i / 7] for i, spec in enumerate(specs)}) == dict.fromkeys(specs, policy.uniform)
