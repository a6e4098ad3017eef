"""`save` and `load` with nested policies, pipelines, two levels and all dtypes, before and after the first step, on any ranks and nodes."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import CheckpointError, GraceError
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states

from .. import catalog

SHAPES = {"a": (40,), "layer/with/slashes": (24, 18), "empty": (0, 3), "scalar": (), "wide": (900,)}
TOPK, LOW_RANK = "topk(ratio=0.1) + residual", "powersgd(rank=2) + residual"
NESTED = (
    f"by_size(min_elements=100, small=every(n=2, then=none, otherwise={TOPK}), large=accordion(interval=2, high={LOW_RANK}, "
    "low=powersgd(rank=1) + residual))",
    "by_name({'a': warmup(steps=2, then=topk(ratio=0.5) + dgc)}, default=by_name({'e*': none}, default=topk(ratio=0.1) + dgc))",
    f"by_size(min_elements=100, large=lgreco(every=3, window=2), small={TOPK})",
    "lgreco(every=2, window=1, base=powersgd(rank=2) + residual)",
    "every(n=2, then=topk(ratio=0.1) + ef21, otherwise=qsgd(bits=4) + residual)",
    f"every(n=2, then={LOW_RANK}, otherwise=powersgd(rank=3) + residual)",
    "every(n=2, then=efsignsgd + residual @ reduce_scatter, otherwise=sidco(ratio=0.1) > qsgd(bits=4) + residual)",
)
PIPELINES = (
    "sidco(ratio=0.1) > qsgd(bits=4) + residual",
    "dgc(ratio=0.1) > fp16 + dgc",
    "topk(ratio=0.1) > sign + residual",
    "global_topk(ratio=0.1) > natural + residual",
    "induced(biased=topk(ratio=0.25), rest=qsgd(bits=4)) + residual",
)
LEVELS = (
    f"{TOPK} @ hierarchical",
    "topk(ratio=0.1) + ef21 @ hierarchical",
    "sidco(ratio=0.1) > qsgd(bits=4) + residual @ hierarchical",
    f"{LOW_RANK} @ hierarchical",
    "topk(ratio=0.1) + residual @ hierarchical(between=sparse_allreduce)",
    "qsgd(bits=4) + residual @ hierarchical(between=reduce_scatter)",
    "topk(ratio=0.1) + gradient_compression @ hierarchical",
    f"every(n=2, then={TOPK} @ hierarchical, otherwise=none)",
    f"by_size(min_elements=100, large={LOW_RANK} @ hierarchical, small={TOPK} @ hierarchical)",
)
SPECS = (*catalog.POLICIES, *NESTED, *PIPELINES, *LEVELS)
#: (ranks, ranks per node) before and after; what is flat knows of no nodes.
FLAT = (((4, 1), (2, 1)), ((2, 1), (3, 1)))
NODES = (((4, 2), (2, 2)), ((2, 2), (6, 2)), ((4, 2), (4, 4)), ((4, 2), (4, 1)), ((3, 2), (1, 1)))
MOVES = [(spec, *move) for spec in SPECS for move in (NODES if spec in LEVELS else FLAT)]


def cluster_of(spec: str, size: int, per_node: int = 1) -> grace_ext.LocalCluster:
    return grace_ext.LocalCluster(grace_ext.grace(spec), size, ranks_per_node=per_node)


def step(cluster: grace_ext.LocalCluster, number: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    return NUMPY.step(cluster, inputs.ranks(cluster.size, number, dtype, SHAPES))


def after(spec: str, steps: int, size: int, per_node: int = 1, dtype: str = "float32") -> grace_ext.LocalCluster:
    cluster = cluster_of(spec, size, per_node)
    for number in range(steps):
        step(cluster, number, dtype)
    return cluster


@pytest.mark.parametrize("dtype", inputs.DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_resume(tmp_path, spec, dtype):
    """A new cluster, and one that had trained otherwise, go on bit for bit from files of before the first step, after it, and later."""
    for steps in (0, 1, 3):
        saved = after(spec, steps, 4, 2, dtype)
        grace_ext.save(saved, tmp_path / str(steps))
        others = [cluster_of(spec, 4, 2), *([after(spec, 2, 4, 2, dtype)] if steps else [])]
        for other in others:
            assert grace_ext.load(other, tmp_path / str(steps)) == steps
            assert all(same_bits(a, b) for a, b in zip(states(saved, NUMPY), states(other, NUMPY), strict=True))
        for number in (steps, steps + 1):
            expected = step(saved, number, dtype)
            assert all(same_bits(step(other, number, dtype), expected) for other in others)


def effect(cluster: grace_ext.LocalCluster, per_node: int) -> dict[str, np.ndarray]:
    """Returns by key and parameter, in float64, what the ranks' own arrays add to the aggregate: their mean over nodes, or over ranks. The
    parts say which these are."""
    said = [part for leaf in cluster.grace.leaves for outer in (leaf.memory, leaf.compressor, leaf.communicator) for part in outer.nested()]
    others = {key for part in said for kind in ("shared", "borrowed", "sharded", "mean") for key in getattr(part, f"{kind}_state")}
    held = states(cluster, NUMPY)[:: per_node if cluster.grace.two_level else 1]
    keys = [key for key in held[0] if ":" not in key and key.split("/")[0] not in others]
    return {key: np.mean([np.float64(state[key]) for state in held], axis=0) for key in keys}


@pytest.mark.parametrize(("spec", "before", "now"), MOVES)
def test_other_ranks_and_nodes(tmp_path, spec, before, now):
    """'mean' keeps what is owed, with 'hierarchical' per node; all goes on, also if the new ranks save before their first step."""
    (old, old_per_node), (new, per_node) = before, now
    for steps in (0, 1, 3):
        folder = tmp_path / str(steps)
        saved = after(spec, steps, old, old_per_node)
        grace_ext.save(saved, folder)
        for how in ("reset", "keep", "mean") if steps == 3 else ("mean",):
            other = cluster_of(spec, new, per_node)
            assert grace_ext.load(other, folder, resize=how) == steps
            if how == "mean":
                owed, due = effect(saved, old_per_node), effect(other, per_node)
                assert set(owed) == set(due)
                for key in owed:
                    np.testing.assert_allclose(due[key], owed[key], rtol=1e-5, atol=1e-6 * np.abs(owed[key]).max(initial=0))
            grace_ext.save(other, folder / "again")
            again = cluster_of(spec, new, per_node)
            assert grace_ext.load(again, folder / "again") == steps
            for number in (steps, steps + 1):
                out = step(other, number)
                assert same_bits(step(again, number), out) and all(np.isfinite(x).all() for x in out.values())
            grace_ext.load(cluster_of(spec, 5, 2), folder / "again")  # and once more on others


def test_nodes_are_compared_with_those_of_the_save(tmp_path, caplog):
    """The same number of ranks on other nodes: the memory is resized, and the log tells so. Nodes with other names are the same nodes."""
    saved = after(LEVELS[0], 3, 4, 2)
    grace_ext.save(saved, tmp_path)
    other = cluster_of(LEVELS[0], 4, 1)
    assert grace_ext.load(other, tmp_path) == 3
    assert ["from 4 to 4 ranks, on 2 and 4 nodes" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    renamed = cluster_of(LEVELS[0], 4, 2)
    for driver in renamed.drivers:
        driver.transport.__class__ = type("Renamed", (type(driver.transport),), {"node": property(lambda self: f"host{self.rank // 2}")})
    assert grace_ext.load(renamed, tmp_path) == 3 and not caplog.records
    assert same_bits(step(renamed, 3), step(saved, 3))


def test_settings_of_sidco_within_a_pipeline_are_no_residual(tmp_path):
    """A resize follows what the inner part declares of its state: numbers of stages are taken over, not averaged."""
    cluster = after(PIPELINES[0], 2, 2)
    for rank, driver in enumerate(cluster.drivers):
        driver.state["a"]["sidco_stages"] = np.float32([1 + rank, 2, 1])
    grace_ext.save(cluster, tmp_path)
    other = cluster_of(PIPELINES[0], 3)
    grace_ext.load(other, tmp_path)
    assert [driver.state["a"]["sidco_stages"].tolist() for driver in other.drivers] == [[1, 2, 1], [2, 2, 1], [1, 2, 1]]


@pytest.mark.parametrize("size", [2, 3])
def test_another_seed_is_told(tmp_path, size):
    """With another seed training would go on, but not as it would have."""
    grace_ext.save(after("randomk(ratio=0.1) + residual", 2, 2), tmp_path)
    other = grace_ext.LocalCluster(grace_ext.grace("randomk(ratio=0.1) + residual", seed=5), size)
    with pytest.raises(CheckpointError, match="saved with seed 0, the exchange has seed 5"):
        grace_ext.load(other, tmp_path)
    assert all(not driver.state and not driver.step for driver in other.drivers)


def test_mean_and_sum_are_told_apart():
    """A sum's estimates are a number of ranks times those of a mean; only on one rank they are the same."""
    cluster = after("topk(ratio=0.1) + ef21", 2, 2)
    saved = cluster.state_dict()
    for state in saved["ranks"]:
        state["op"] = "sum"
    with pytest.raises(GraceError, match="rank 0: .* saved with op 'sum', the exchange has op 'mean'"):
        cluster.load_state_dict(saved)
