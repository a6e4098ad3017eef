"""Resuming on another number of ranks keeps the effect of residuals on the aggregate, and keeps related arrays consistent."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.checkpoints.resize import resized, told
from grace_ext.errors import GraceError, ParameterError
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY

from .. import catalog

SHAPES = {"a": (40,), "layer/with/slashes": (24, 18), "empty": (0, 3)}


def after(spec: str, size: int, steps: int = 3, per_node: int = 1):
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), size, ranks_per_node=per_node)
    for step in range(steps):
        NUMPY.step(cluster, inputs.ranks(size, step, shapes=SHAPES))
    return cluster


def states(cluster) -> list[dict]:
    return cluster.state_dict()["ranks"]


def on(cluster, size: int, how: str, per_node: int = 1):
    """Returns a cluster of `size` ranks that continues from this one's states."""
    other = grace_ext.LocalCluster(cluster.grace, size, ranks_per_node=per_node)
    other.load_state_dict({"version": 1, "ranks": resized(states(cluster), size, how)})
    return other


def drained(cluster, steps: int) -> dict[str, np.ndarray]:
    """Returns the sum, in float64, of the results of this many steps with zero gradients."""
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for _ in range(steps):
        for name, x in NUMPY.step(cluster, [{n: np.zeros(s, np.float32) for n, s in SHAPES.items()}] * cluster.size).items():
            total[name] += x
    return total


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("spec", ["topk(ratio=0.1) + residual", "topk(ratio=0.1) + gradient_compression(momentum=0, nesterov=True)",
                                  "efsignsgd(block=8) + residual @ reduce_scatter", "topk(ratio=0.1) + ef_star"])  # fmt: skip
def test_the_update_delivered_is_the_one_that_was_owed(spec, old, new):
    """By a float64 oracle: mean gradients less results before the resize equal the results after it with zero gradients."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), old)
    owed = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(4):
        gradients = inputs.ranks(old, step, shapes=SHAPES)
        out = NUMPY.step(cluster, gradients)
        for name in SHAPES:
            owed[name] += np.mean([np.float64(g[name]) for g in gradients], axis=0) - np.float64(out[name])
    sent = drained(on(cluster, new, "mean"), 600 if "efsign" in spec else 60)
    for name in SHAPES:
        tolerance = 5e-3 if "efsign" in spec else 1e-5  # signs never drain a residual completely
        np.testing.assert_allclose(sent[name], owed[name], rtol=0, atol=tolerance * max(1, np.abs(owed[name]).max(initial=0)))
    assert max(np.abs(x).max(initial=0) for x in owed.values()) > 0.5  # the residuals were not empty


@pytest.mark.parametrize("how", ["keep", "reset"])
def test_keep_and_reset_do_lose_it(how):
    cluster = after("topk(ratio=0.1) + residual", 3)
    held = [np.float64(state["state"]["residual/a"]) for state in states(cluster)]
    sent = drained(on(cluster, 2, how), 60)
    np.testing.assert_allclose(sent["a"], (held[0] + held[1]) / 2 if how == "keep" else 0 * held[0], atol=1e-5)
    assert np.abs(sent["a"] - np.mean(held, axis=0)).max() > 0.1


def test_of_a_sum_the_sum_is_kept():
    """With op=Sum, aggregates are not divided, so the sum of the residuals is kept instead of their mean."""
    ranks = [{**state, "op": "sum"} for state in states(after("topk(ratio=0.1) + residual", 2))]
    total = sum(np.float64(state["state"]["residual/a"]) for state in ranks)
    new = resized(ranks, 3)
    np.testing.assert_allclose(sum(np.float64(state["state"]["residual/a"]) for state in new), total, rtol=1e-6)
    means = resized(states(after("topk(ratio=0.1) + residual", 2)), 3)
    np.testing.assert_allclose(np.float64(means[2]["state"]["residual/a"]), total / 2, rtol=1e-6)


@pytest.mark.parametrize("how", ["mean", "keep", "reset"])
@pytest.mark.parametrize("spec", [s for s in catalog.shelf() if "cser" not in s])
def test_every_part_goes_on_with_more_and_with_fewer_ranks(spec, how):
    """The state loads, training continues, and shared state stays equal on all ranks."""
    cluster = after(spec, 2)
    if how == "keep" and "ef_star" in spec:
        with pytest.raises(GraceError, match="resize='mean'"):
            on(cluster, 3, how)
        return
    three = on(cluster, 3, how)
    assert three.drivers[0].step == 3
    NUMPY.step(three, inputs.ranks(3, 3, shapes=SHAPES))
    two = on(three, 2, how)
    out = NUMPY.step(two, inputs.ranks(2, 4, shapes=SHAPES))
    assert all(np.isfinite(x).all() for x in out.values())
    shared = two.drivers[0]._choices.shared()
    for key, array in states(two)[0]["state"].items():
        if key.split("/")[0] in shared - {"sidco_stages"}:
            assert array.tobytes() == states(two)[1]["state"][key].tobytes()


@pytest.mark.parametrize("how", ["mean", "keep", "reset"])
@pytest.mark.parametrize(("spec", "mean", "own"), [
    ("topk(ratio=0.1) + ef21", "ef21_mean", "ef21_estimate"),
    ("topk(ratio=0.1) + ef21_sgdm", "ef21_mean", "ef21_estimate"),
    ("qsgd(bits=4) + diana", "diana_mean", "diana_shift"),
])  # fmt: skip
def test_the_mean_of_the_estimates_stays_their_mean(spec, mean, own, how):
    """The shared mean equals the mean of the estimates; otherwise every later aggregate would be wrong by the difference."""
    for state in resized(states(after(spec, 2)), 3, how):
        others = [np.float64(s["state"][f"{own}/a"]) for s in resized(states(after(spec, 2)), 3, how)]
        np.testing.assert_allclose(np.float64(state["state"][f"{mean}/a"]), np.mean(others, axis=0), rtol=1e-6, atol=1e-7)
    assert how == "reset" or np.abs(state["state"][f"{mean}/a"]).max() > 0


def test_ef21_still_finds_the_gradient_after_a_resize():
    """With constant gradients the estimates converge to them, on any number of ranks."""
    cluster = on(after("topk(ratio=0.25) + ef21", 2), 3, "mean")
    gradients = inputs.ranks(3, 99, shapes=SHAPES)
    for _ in range(80):
        out = NUMPY.step(cluster, gradients)
    np.testing.assert_allclose(out["a"], np.mean([g["a"] for g in gradients], axis=0), atol=1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_shards_follow_one_another(cut, request):
    """Shards are cut anew for the new ranks, or a small tensor's one shard gets a new owner, and nothing of them is lost."""
    if cut:
        request.getfixturevalue("small_shards")
    cluster = after("efsignsgd(block=8) + residual @ reduce_scatter", 3)
    whole = np.concatenate([state["state"]["shard_residual/a"] for state in states(cluster)])
    assert len(whole) == 40 and whole.any()
    new = resized(states(cluster), 4)
    assert sorted(len(state["state"]["shard_residual/a"]) for state in new) == ([10] * 4 if cut else [0, 0, 0, 40])
    on(cluster, 4, "mean")
    assert np.concatenate([state["state"]["shard_residual/a"] for state in new]).tobytes() == whole.tobytes()


def test_missing_ranks_count_as_zero():
    """If one of three ranks died, the others' shares of the aggregate stay what they were, a third each."""
    ranks = states(after("topk(ratio=0.1) + residual", 3))
    new = resized([ranks[0], ranks[2]], 2)
    expected = (np.float64(ranks[0]["state"]["residual/a"]) + ranks[2]["state"]["residual/a"]) / 3
    np.testing.assert_allclose(new[1]["state"]["residual/a"], expected, rtol=1e-6)
    kept = resized([ranks[0], ranks[2]], 2, "keep")
    assert kept[1]["state"]["residual/a"].tobytes() == ranks[2]["state"]["residual/a"].tobytes()


def test_a_node_counts_once():
    """With 'hierarchical', all ranks of a node hold the node's residual, and the mean over the nodes is kept."""
    spec = "topk(ratio=0.1) + residual @ hierarchical"
    cluster = after(spec, 3, per_node=2)  # nodes of 2 and of 1
    held = [np.float64(state["state"]["residual/a"]) for state in states(cluster)]
    assert (held[0] == held[1]).all() and (held[0] != held[2]).any()
    np.testing.assert_allclose(drained(on(cluster, 4, "mean", per_node=2), 60)["a"], (held[0] + held[2]) / 2, atol=1e-5)
    assert "from 3 to 4 ranks" in told(states(cluster), resized(states(cluster), 4), "mean")
    with pytest.raises(GraceError, match="nodes="):
        resized(states(cluster), 4, "keep")
    with pytest.raises(ParameterError, match="each of the 4 ranks"):
        resized(states(cluster), 4, "keep", nodes=["x"])
    kept = resized(states(cluster), 4, "keep", nodes=["x", "x", "y", "z"])  # one node more, which starts at zero
    for state, expected in zip(kept, (held[0], held[0], held[2], 0 * held[0]), strict=True):
        np.testing.assert_array_equal(state["state"]["residual/a"], expected)
    summed = resized([{**state, "op": "sum"} for state in states(cluster)], 4, nodes=["x", "x", "y", "z"])
    np.testing.assert_allclose(summed[3]["state"]["residual/a"], (held[0] + held[2]) / 3, rtol=1e-6)  # three nodes have the sum of two


def test_ranks_and_nodes_that_are_missing():
    """A node that lost some of its ranks still has its memory; that of a node that lost all of them is lost."""
    cluster = after("topk(ratio=0.1) + residual @ hierarchical", 4, per_node=2)
    ranks = states(cluster)
    of_node = [np.float64(ranks[rank]["state"]["residual/a"]) for rank in (0, 2)]
    for there, expected in (((0, 2, 3), (of_node[0] + of_node[1]) / 2), ((0, 1), of_node[0] / 2)):
        new = resized([ranks[rank] for rank in there], 2)
        np.testing.assert_allclose(new[1]["state"]["residual/a"], expected, rtol=1e-6)
    with pytest.raises(GraceError, match="missing"):
        resized([{key: x for key, x in state.items() if key != "nodes"} for state in ranks[:2]], 2)


def test_the_log_says_what_was_lost():
    ranks = states(after("topk(ratio=0.1) + residual", 3))
    owed = np.sqrt(sum(np.square(np.mean([np.float64(s["state"][key]) for s in ranks], axis=0)).sum() for key in ranks[0]["state"]))
    for how in ("mean", "reset"):
        sentence = told(ranks, resized(ranks, 2, how), how)
        assert f"from 3 to 2 ranks: what they had not sent has norm {owed:.6g}" in sentence
        assert (f", {owed:.6g} after it" if how == "mean" else ", 0 after it") in sentence


def test_errors():
    ranks = states(after("topk(ratio=0.1) + residual", 2))
    before = {key: x.copy() for key, x in ranks[0]["state"].items()}
    for wrong in ("sum", None, 3):
        with pytest.raises(ParameterError, match="'mean', 'keep', 'reset'"):
            resized(ranks, 3, wrong)
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(ParameterError, match="at least 1"):
            resized(ranks, wrong)
    with pytest.raises(GraceError, match="no state"):
        resized([], 3)
    with pytest.raises(GraceError, match="step 3 and 2"):
        resized([ranks[0], {**ranks[1], "step": 2}], 3)
    with pytest.raises(GraceError, match="other parameters"):
        resized([ranks[0], {**ranks[1], "state": {}}], 3)
    with pytest.raises(GraceError, match="sync"):
        resized(states(after("topk(ratio=0.1) + cser", 2)), 3)
    resized(ranks, 3)
    assert all((ranks[0]["state"][key] == x).all() for key, x in before.items())
