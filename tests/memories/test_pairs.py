"""Memories beside each other: what their keys of state mean, policies that alternate them, and the means that all ranks must share."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import grace_ext
from grace_ext.composition.composition import Composition
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import NUMPY, states
from tests import catalog

SHAPE = (6, 8)
KINDS = ("shared_state", "borrowed_state", "sharded_state", "zero_sum_state", "mean_state")


def composed(text: str) -> grace_ext.Grace | None:
    try:
        return grace_ext.grace(text)
    except IncompatiblePartsError:
        return None


def state_keys(leaf: Composition) -> dict[str, tuple[object, int]]:
    """Returns, by key of state, the part that has it and its length for a matrix of SHAPE."""
    spec, info = TensorSpec("w", SHAPE), StepInfo(0, 0, 2, 2, lr=0.1)
    found = {}
    for part, state in (
        (leaf.memory, leaf.memory.init(NUMPY.ops, spec, info)),
        (leaf.compressor, leaf.compressor.init(NUMPY.ops, spec, info)),
        (leaf.communicator, leaf.communicator.init(NUMPY.ops, leaf.compressor, spec, info)),
    ):
        for key, array in state.items():
            assert key not in found, f"{leaf}: two parts keep {key!r}"
            found[key] = part, len(array)
    return found


def test_a_key_of_state_is_declared_alike_by_all_parts():
    """Whether an array is a rank's own, shared, a shard or a mean must not depend on which part wrote it last."""
    declared: dict[str, dict[str, object]] = {}
    for text in catalog.ALL:
        for key, (part, _) in state_keys(grace_ext.grace(text).route).items():
            declared.setdefault(key, {})[str(part)] = tuple(
                dict(part.mean_state).get(key, False) if kind == "mean_state" else key in getattr(part, kind) for kind in KINDS
            )
    assert {"residual", "own_momentum", "momentum", "ef21_mean", "powersgd_q", "shard_residual"} <= set(declared)
    for key, by_part in declared.items():
        assert len(set(by_part.values())) == 1, (key, by_part)


PAIRS = [
    pytest.param(text, id=f"{first}-{second}-{compressor}")
    for first, second in itertools.permutations(catalog.MEMORIES, 2)
    for compressor in ("topk(ratio=0.25)", "randomk(ratio=0.25, scale=True)")
    if composed(text := f"every(n=2, then={compressor} + {first}, otherwise={compressor} + {second})")
]


def test_many_pairs_are_let_in_and_two_momenta_are_not():
    assert len(PAIRS) > 100
    for pair in ("dgc", "gradient_compression"), ("momentum_compression", "residual"), ("ef21_sgdm", "update_compression"):
        with pytest.raises(IncompatiblePartsError, match="would miss the gradients of the others' steps"):
            grace_ext.grace(f"every(n=2, then=topk + {pair[0]}, otherwise=topk + {pair[1]})")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", PAIRS)
def test_memories_that_take_turns(spec):
    """Ranks stay equal, a state that was saved goes on bit for bit, and nothing is lost: what was sent, and what each memory still keeps
    in its own unit, add up to the gradients."""
    g, size, rate = grace_ext.grace(spec), 2, 0.25
    cluster, sent, given = NUMPY.cluster(g, size), np.zeros(SHAPE), np.zeros(SHAPE)
    for step in range(7):
        gradients = [{"w": np.random.default_rng([step, rank]).standard_normal(SHAPE).astype("f4")} for rank in range(size)]
        if step == 3:
            again = NUMPY.cluster(g, size)
            again.load_state_dict(cluster.state_dict())
        out = cluster.step(gradients, lr=rate)  # raises if the ranks' results differ, unless the memory lets them
        if step >= 3:
            assert _bits(again.step(gradients, lr=rate)) == _bits(out)
        first = np.mean([one["w"] for one in out], axis=0) if isinstance(out, list) else out["w"]
        sent, given = sent + first, given + np.mean([x["w"].astype("f8") for x in gradients], axis=0)
    exact = {"none", "residual", "efsignsgd", "dist_ef_block", "powersgd"}
    named = [leaf.memory for leaf in g.leaves]
    if {memory.name for memory in named} <= exact and not any(getattr(memory, "momentum", 0) for memory in named):
        lossless = all(memory.feeds_back and getattr(memory, "beta", 1) == getattr(memory, "gamma", 1) == 1 for memory in named)
        if lossless:
            units = {"residual": 1.0, "update_residual": 1 / rate, "rated_residual": 1.0}
            held = [{k.split("/")[0]: x.astype("f8") for k, x in rank.items()} for rank in states(cluster, NUMPY)]
            kept = np.mean([sum(units[k] * x for k, x in rank.items() if k in units) for rank in held], axis=0)
            np.testing.assert_allclose(sent + kept.reshape(SHAPE), given, atol=1e-4)


def _bits(out) -> bytes:
    return b"".join(one["w"].tobytes() for one in (out if isinstance(out, list) else [out]))


# --- means of estimates -----------------------------------------------------------------------------------------------
#: Communicators, also between nodes, and settings that could let a second compression in.
CARRIERS = (*(name for name in catalog.COMMUNICATORS if name != "broadcast"), "reduce_scatter(feedback=False)")
WAYS = (*CARRIERS, *(f"hierarchical(between={name})" for name in CARRIERS))
FOLLOWING = [
    text
    for compressor in (*catalog.COMPRESSORS, "demo(topk=64, values='fp32')", "randblock(ratio=0.25, scale=True, values='fp16')")
    for memory in ("ef21", "ef21_sgdm(momentum=0.5)", "diana")
    for way in WAYS
    if composed(text := f"{compressor} + {memory} @ {way}")
]


def test_where_the_result_is_no_mean_estimates_are_refused():
    assert len(FOLLOWING) > 100
    for bad in (
        "qsgd(bits=4) + diana @ reduce_scatter",
        "topk + ef21 @ reduce_scatter(feedback=False)",
        "demo(values='fp32') + ef21",
        "natural + diana @ hierarchical(between=reduce_scatter)",
        "randomk(ratio=0.25, scale=True, values='fp16') + diana(alpha=0.1)",
    ):
        with pytest.raises(IncompatiblePartsError, match="keeps the mean of what all ranks have sent"):
            grace_ext.grace(bad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", FOLLOWING)
def test_estimates_of_constant_gradients_converge_to_their_mean(spec):
    """With the same gradients at every step the estimates become exact, and the result is their mean."""
    gradients = [{"w": np.random.default_rng(rank).standard_normal(SHAPE).astype("f4")} for rank in range(4)]
    mean = np.mean([g["w"].astype("f8") for g in gradients], axis=0)
    cluster = NUMPY.cluster(grace_ext.grace(spec), 4, **({"ranks_per_node": 2} if "hierarchical" in spec else {}))
    start = error = float(np.abs(mean).max())
    for _ in range(400):  # vqsgd(repeats=1) has so high a variance that it needs most of them
        for _ in range(10):
            out = cluster.step(gradients)
        error = np.abs((out[0] if isinstance(out, list) else out)["w"] - mean).max()
        if error < 1e-3 * start:
            return
    raise AssertionError(f"{spec}: the result is {error / start:.3g} of the largest gradient off after 4,000 steps")


@pytest.mark.parametrize("spec", ["none + ef21 @ allreduce", "by_size(large=topk(ratio=0.25) + ef21_sgdm @ hierarchical, min_elements=16)"])
def test_the_mean_of_estimates_does_not_drift_in_16_bits(spec):
    """After 10,000 steps what all ranks take for the mean of their estimates is that mean."""
    cluster = NUMPY.cluster(grace_ext.grace(spec), 4, **({"ranks_per_node": 2} if "hierarchical" in spec else {}))
    draw = np.random.default_rng(0)
    for _ in range(10_000):
        cluster.step([{"w": draw.standard_normal(12).astype("f2")} for _ in range(4)])
    held = states(cluster, NUMPY)
    drift = np.abs(held[0]["ef21_mean/w"] - np.mean([rank["ef21_estimate/w"].astype("f8") for rank in held], axis=0)).max()
    assert drift < 1e-4, drift
