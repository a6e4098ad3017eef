"""Tests L-GreCo inside Accordion: critical tensors share one budget of errors, all others go through `low`."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import grace_ext
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing.checks import check_resume
from grace_ext.testing.worlds import NUMPY

HIGH, LOW = "topk(ratio=0.05) + residual", "topk(ratio=0.005) + residual"
EVERY = 8
ALONE = f"accordion(high={HIGH}, low={LOW}, interval={EVERY})"
MIXED = f"accordion(high=lgreco(base={HIGH}, every={EVERY}, window=4), low={LOW}, interval={EVERY})"
BOTH = f"accordion(high=lgreco(base={HIGH}, every={EVERY}, window=4), low=lgreco(base={LOW}, every={EVERY}, window=4), interval={EVERY})"
SHAPES = {"large": (80, 60), "flat": (60, 50), "steady": (50, 40), "small": (40,)}


def gradients(step, size=2):
    """Returns gradients per rank. All tensors but 'steady' grow threefold in every other interval of Accordion; 'large' has a few large
    elements, 'flat' many of one size."""
    scale = 3.0 ** (step // EVERY % 2)
    made = []
    for rank in range(size):
        draw = np.random.default_rng([step, rank])
        rare = np.random.default_rng(1).random(SHAPES["large"]) < 0.02
        made.append({
            "large": scale * draw.standard_normal(SHAPES["large"]) * np.where(rare, 1, 0.01) + scale * rare,
            "flat": 0.1 * scale * (1 + 0.1 * draw.standard_normal(SHAPES["flat"])),
            "steady": 1 + 0.1 * draw.standard_normal(SHAPES["steady"]),
            "small": scale * (1 + draw.standard_normal(SHAPES["small"])),
        })  # fmt: skip
    return [{name: array.astype(np.float32) for name, array in mapping.items()} for mapping in made]


def regimes(cluster):
    return {name: bool(state["policy:regime"][1]) for name, state in cluster.drivers[0].state.items()}


def numbers(cluster, rank=0, place="policy.high"):
    return {name: int(state[f"{place}:setting"][0]) for name, state in cluster.drivers[rank].state.items()}


def test_it_sends_less_than_accordion_alone_and_regimes_switch():
    """Over 80 steps regimes switch, all ranks agree on every choice, and the mix sends fewer bytes than Accordion alone."""
    sent, seen = {}, []
    for spec in (ALONE, MIXED, BOTH):
        cluster, sent[spec] = NUMPY.cluster(grace_ext.grace(spec), 2), 0
        for step in range(10 * EVERY):
            NUMPY.step(cluster, gradients(step))
            sent[spec] += cluster.wire_bytes[0]
            chosen = [{name: tuple(map(str, parts)) for name, parts in driver.parts.items()} for driver in cluster.drivers]
            assert chosen[0] == chosen[1]
            if spec == MIXED and step % EVERY == EVERY - 1:
                seen.append(regimes(cluster))
                assert numbers(cluster, 0) == numbers(cluster, 1)
    assert len({tuple(one.values()) for one in seen}) > 2
    assert not any(one["steady"] for one in seen[2:]) and sum(one["large"] for one in seen) > 4
    assert max(sent[BOTH], sent[MIXED]) < 0.5 * sent[ALONE], sent


def test_only_critical_tensors_share_the_budget(world):
    """At each decision, the tensors that will go through `high` have the best choices of all within the errors of the uniform choice for
    these tensors alone, and never send more than it; the others are at the uniform choice when they come back."""
    cluster, sums = world.cluster(grace_ext.grace(MIXED), 2), {}
    policy = cluster.grace.policy.high
    decided = set()
    for step in range(6 * EVERY):
        by_rank = gradients(step)
        world.step(cluster, by_rank)
        if step % EVERY < EVERY - 4:
            sums = {name: np.zeros((2, math.prod(shape))) for name, shape in SHAPES.items()}
            continue
        for name, rank in itertools.product(SHAPES, range(2)):
            sums[name][rank] += by_rank[rank][name].astype(np.float64).reshape(-1)
        if step % EVERY < EVERY - 1:
            continue
        critical, chosen = [name for name, is_critical in regimes(cluster).items() if is_critical], numbers(cluster)
        decided.add(tuple(critical))
        assert all(chosen[name] == policy.uniform for name in SHAPES if name not in critical)
        errors, sizes = {}, {}
        for name in critical:
            spec, ordered = TensorSpec(name, SHAPES[name]), np.sort(np.abs(sums[name]), axis=1)[:, ::-1]
            counts = [max(1, math.ceil(value * spec.size - 1e-9)) for value in policy.values]
            dense = [leaf.parts_for(spec)[0].name == "none" for leaf in policy.leaves]
            lost = [float(np.linalg.norm(ordered[:, k:], axis=1).mean()) for k in counts]
            errors[name] = [0.0 if d else each for d, each in zip(dense, lost, strict=True)]
            sizes[name] = [leaf.nbytes(spec) for leaf in policy.leaves]
        if not critical:
            continue
        budget = sum(of_name[policy.uniform] for of_name in errors.values())
        best = min(
            sum(sizes[n][i] for n, i in zip(critical, c, strict=True))
            for c in itertools.product(range(len(policy.values)), repeat=len(critical))
            if sum(errors[n][i] for n, i in zip(critical, c, strict=True)) <= budget * (1 - 4e-4)
        )
        sent = sum(sizes[name][chosen[name]] for name in critical)
        assert sent <= min(best, sum(of_name[policy.uniform] for of_name in sizes.values()))
        assert sum(errors[name][chosen[name]] for name in critical) <= budget * (1 + 1e-6)
    assert len(decided) > 2


@pytest.mark.parametrize("spec", [MIXED, BOTH])
@pytest.mark.parametrize("at", [5, 8, 21])
def test_resuming(world, spec, at):
    """A fresh cluster that loads the state, in a window, at a decision, or in a later interval, continues bit for bit through decisions."""
    check_resume(world, spec, steps=at + 2 * EVERY, at=at, gradients=gradients)


@pytest.mark.parametrize(
    "spec",
    [
        f"accordion(high={HIGH}, low=lgreco(base={LOW}))",  # some of its choices send more than `high`
        "accordion(high=lgreco(base=powersgd(rank=4) + residual), low=powersgd(rank=1) + residual)",
        "accordion(high=lgreco(base=qsgd(bits=8)), low=qsgd(bits=2))",
    ],
)
def test_policies_in_both_places_are_accepted(spec):
    assert grace_ext.grace(spec).policy.name == "accordion"
    with pytest.raises(grace_ext.errors.ParameterError, match="Swap them"):
        grace_ext.grace("accordion(high=lgreco(base=topk(ratio=0.001) + residual, high=2), low=topk(ratio=0.01) + residual)")


@pytest.mark.parametrize("outer", ["every(n=8, then=none, otherwise={})", "warmup(steps=8, then={})", "by_size(min_elements=1, large={})"])
def test_policies_that_go_by_the_step_do_not_hide_a_tensor_from_lgreco(outer):
    """A decision at the end of a step counts, although the next step is a dense one, or the last one was."""
    cluster = NUMPY.cluster(grace_ext.grace(outer.format(f"lgreco(base={HIGH}, every=8, window=4)")), 2)
    for step in range(8):
        NUMPY.step(cluster, gradients(step))
    (place,) = {key.split(":")[0] for key in cluster.drivers[0].state["large"] if key.endswith(":setting")}
    assert len(set(numbers(cluster, 0, place).values())) > 1
