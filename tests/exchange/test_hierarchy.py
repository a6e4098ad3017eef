"""Two-level exchanges on simulated ranks: `between` exchanges the sums of each node's ranks, with the right weights; which rank sends what;
states; and what is rejected. Real engines are tested by tests/frameworks/test_levels.py."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.driver.driver import Driver
from grace_ext.errors import GraceError, IncompatiblePartsError, ParameterError, UnsupportedError
from grace_ext.exchange.transport import Transport
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WITH_DEVICE, same_bits, states, tapped

from .. import catalog

#: (ranks, ranks per node)
LAYOUTS = [(4, 2), (6, 3), (3, 2), (5, 3), (7, 1), (4, 4)]
SHAPES = {"matrix": (24, 18), "vector": (193,), "scalar": (), "empty": (0, 3)}


def allowed(compressor: str, memory: str, between: str) -> grace_ext.Grace | None:
    try:
        return grace_ext.grace(f"{compressor} + {memory} @ hierarchical(between={between})")
    except IncompatiblePartsError:
        return None


SPECS = [g for c in catalog.REPRESENTATIVE + ("none", "fp16", "signsgd") for b in catalog.COMMUNICATORS if (g := allowed(c, "residual", b))]


def nodes_of(size: int, per_node: int) -> list[range]:
    return [range(size)[i : i + per_node] for i in range(0, size, per_node)]


def summed(given, nodes, n):
    """Returns the nodes' weighted sums, computed in float64 and rounded once to the gradients' dtype."""
    scale = len(nodes) / n
    return [
        {name: np.asarray(sum(given[r][name].astype("f8") for r in ranks) * scale).astype(array.dtype) for name, array in given[0].items()}
        for ranks in nodes
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("g", SPECS, ids=str)
def test_nodes_exchange_their_weighted_sums(g, layout):
    """Results of two steps, and every rank's state, are those of a flat exchange with one rank per node on the nodes' weighted sums."""
    size, per_node = layout
    nodes = nodes_of(*layout)
    cluster = grace_ext.LocalCluster(g, size, ranks_per_node=per_node)
    inner = grace_ext.grace(compressor=g.compressor, memory=g.memory, communicator=g.communicator.between)
    flat = grace_ext.LocalCluster(inner, len(nodes))
    generator = np.random.default_rng(3)
    for step in range(2):
        # Weighted sums of multiples of size * 2**-12 are exact; with rounding, a last bit could select other elements.
        drawn = [{k: np.round(generator.standard_normal(s) * 4096) for k, s in SHAPES.items()} for _ in range(size)]
        given = [{k: (x * size / 4096).astype("f4") for k, x in mine.items()} for mine in drawn]
        got = NUMPY.everywhere(cluster, given)
        if len(nodes) == 1 and g.compressor.result == "mean":  # nothing is compressed; a vote stays one
            expected = {name: sum(x[name].astype("f8") for x in given) / size for name in SHAPES}
        else:
            expected = flat.step(summed(given, nodes, size), lr=0.125)
        for name, want in expected.items():
            assert all(mine[name].tobytes() == got[0][name].tobytes() for mine in got), (name, step)
            assert got[0][name].shape == want.shape
            assert np.allclose(got[0][name], want, rtol=1e-5, atol=1e-6), (name, step)
    if len(nodes) > 1:
        held, wanted = states(cluster, NUMPY), states(flat, NUMPY)
        for number, ranks in enumerate(nodes):
            for rank in ranks:
                assert held[rank].keys() == wanted[number].keys()
                assert all(np.allclose(held[rank][key], array, rtol=1e-4, atol=1e-5) for key, array in wanted[number].items())


@pytest.mark.parametrize(
    "spec",
    [
        "powersgd(rank=1) + gradient_compression",
        "topk(ratio=0.1) + dgc",
        "topk(ratio=0.1) + update_compression(nesterov=True)",
        "randomk(ratio=0.1) + ef21_sgdm",
        "topk(ratio=0.1) + residual",
    ],
)
def test_on_a_single_node_memories_go_on(spec):
    """Ranks that share one node compress nothing, but the training keeps its momentum, and the state is that of any number of nodes."""
    g = grace_ext.grace(f"{spec} @ hierarchical")
    sent_whole = grace_ext.grace(f"topk(ratio=1) + {g.memory}")  # a compressor that picks positions, for the momentum's mask
    one, many, dense = (grace_ext.LocalCluster(x, 2, ranks_per_node=per) for x, per in ((g, 2), (g, 1), (sent_whole, 1)))
    for step in range(3):
        given = inputs.ranks(2, step, shapes=SHAPES)
        got, expected, _ = one.step(given), dense.step(given), many.step(given)
        assert all(np.allclose(got[name], expected[name], rtol=1e-5, atol=1e-6) for name in SHAPES)
    assert {k: len(x) for k, x in states(one, NUMPY)[0].items()} == {k: len(x) for k, x in states(many, NUMPY)[0].items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("world", WITH_DEVICE, ids=lambda w: w.name)
def test_linear_ones_equal_the_flat_mean(world, layout):
    """The uncompressed mean is right within 1e-6, on uneven nodes, too; float64 and half precision keep their dtypes."""
    size, per_node = layout
    for dtype in ("float32", "float64", "float16"):
        given = inputs.ranks(size, 0, dtype, SHAPES)
        cluster = world.cluster(grace_ext.grace("none @ hierarchical"), size, per_node)
        got = world.step(cluster, given)
        for name in SHAPES:
            want = sum(x[name].astype("f8") for x in given) / size
            assert got[name].dtype == given[0][name].dtype
            tolerance = 1e-3 if dtype == "float16" else 1e-6
            assert np.abs(got[name] - want).max(initial=0) <= tolerance * max(1.0, np.abs(want).max(initial=0)), (name, dtype)


@pytest.mark.parametrize("world", [w for w in WITH_DEVICE if w is not NUMPY], ids=lambda w: w.name)
@pytest.mark.parametrize("g", SPECS, ids=str)
def test_the_same_in_every_library(world, g):
    """Results and states of every rank are those of numpy arrays, bit for bit (of products of matrices, nearly), on uneven nodes."""
    clusters = [(one, one.cluster(g, 3, 2)) for one in (world, NUMPY)]
    for step in range(2):
        given = inputs.ranks(3, step, shapes=SHAPES)
        (ours, held), (theirs, wanted) = ((one.everywhere(cluster, given), states(cluster, one)) for one, cluster in clusters)
        for mine, other in zip([*ours, *held], [*theirs, *wanted], strict=True):
            near = not g.compressor.deterministic_bytes and all(np.allclose(mine[k], x, rtol=1e-3, atol=1e-4) for k, x in other.items())
            assert near or same_bits(mine, other), step


def test_cser_needs_even_nodes():
    """cser rejects nodes of different sizes, because its errors belong to nodes, but models are averaged over ranks."""
    given = inputs.ranks(5, 0, shapes=SHAPES)
    cluster = grace_ext.LocalCluster(grace_ext.grace("topk(ratio=0.1) + cser @ hierarchical"), 5, ranks_per_node=2)
    with pytest.raises(UnsupportedError, match=r"on nodes of \[2, 2, 1\] ranks"):
        cluster.step(given, lr=0.1)
    grace_ext.LocalCluster(grace_ext.grace("topk(ratio=0.1) + cser @ hierarchical"), 4, ranks_per_node=2).step(given[:4], lr=0.1)


def test_states_of_other_nodes_are_refused():
    """States hold the memory of a node. With other nodes, ranks of one node would have different memories, or two nodes the same."""
    g, given = grace_ext.grace("topk(ratio=0.1) + residual @ hierarchical"), inputs.ranks(6, 0, shapes=SHAPES)
    before = grace_ext.LocalCluster(g, 6, ranks_per_node=2)
    before.step(given)
    for per_node in (1, 3, 6):
        other = grace_ext.LocalCluster(g, 6, ranks_per_node=per_node)
        other.load_state_dict(before.state_dict())
        with pytest.raises(GraceError, match="shared 3 nodes otherwise than they share"):
            other.step(given)
    same = grace_ext.LocalCluster(g, 6, ranks_per_node=2)
    same.load_state_dict(before.state_dict())
    assert all((a == b).all() for a, b in zip(same.step(given).values(), before.step(given).values(), strict=True))


def test_a_sum_is_a_sum():
    """With divisor 1 (op=Sum) the result is the sum over all ranks."""
    cluster = grace_ext.LocalCluster(grace_ext.grace("none @ hierarchical"), 5, ranks_per_node=2)
    for driver in cluster.drivers:
        driver.divisor = 1
    given = inputs.ranks(5, 0, shapes=SHAPES)
    got = cluster.step(given)
    assert all(np.allclose(got[name], sum(x[name].astype("f8") for x in given), atol=1e-5) for name in SHAPES)


def test_only_first_ranks_talk_between_nodes():
    """With 4 ranks on 2 nodes, only ranks 0 and 2 exchange payloads. Inside a node, dense sums and received payloads travel. `wire_bytes`
    counts all of these."""
    g = grace_ext.grace("topk(ratio=0.01) + residual @ hierarchical")
    cluster = grace_ext.LocalCluster(g, 4, ranks_per_node=2)
    flat = grace_ext.LocalCluster(grace_ext.grace("topk(ratio=0.01) + residual"), 4)
    given = [{"w": x["w"]} for x in inputs.ranks(4, 0, shapes={"w": (100, 90)})]
    with tapped() as seen:
        cluster.step(given)
    payload = 0
    with tapped() as there:
        flat.step(given)
    payload = there[0].nbytes[0]
    between = [s for s in seen if s.kind == "allgather"]
    assert [s.nbytes for s in between] == [[payload, payload]]  # the payloads of the nodes' first ranks
    inside = [s for s in seen if s.kind == "allreduce"]
    assert [s.nbytes for s in inside] == [[36000, 36000]] * 2
    shared = [s for s in seen if s.kind == "broadcast"]
    assert [s.nbytes for s in shared] == [[2 * payload, 0]] * 2
    assert cluster.wire_bytes == [36000 + 3 * payload, 36000, 36000 + 3 * payload, 36000]


def test_a_rank_that_is_not_finite_is_seen_by_all(world):
    cluster = world.cluster(grace_ext.grace("topk(ratio=0.1) + residual @ hierarchical"), 4, 2)
    for step in range(3):
        given = inputs.ranks(4, step, shapes=SHAPES)
        before = states(cluster, world)
        if step == 1:
            given[3]["vector"][5] = np.inf
        returned = world.everywhere(cluster, given)
        assert all(np.isnan(out["vector"]).all() == (step == 1) for out in returned)
        assert all(d.committed == (step != 1) for d in cluster.drivers)
        if step == 1:
            after = states(cluster, world)
            assert all(np.array_equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in b)


def test_state_resumes_bit_for_bit(world):
    g = grace_ext.grace("topk(ratio=0.1) + residual @ hierarchical")
    one, other = (world.cluster(g, 4, 2) for _ in range(2))
    world.step(one, inputs.ranks(4, 0, shapes=SHAPES))
    world.step(other, inputs.ranks(4, 7, shapes=SHAPES))
    other.load_state_dict(one.state_dict())
    assert same_bits(*(world.step(cluster, inputs.ranks(4, 1, shapes=SHAPES)) for cluster in (one, other)))


def test_written_and_read_again():
    for text in ("topk(ratio=0.1) + residual @ hierarchical", "topk(ratio=0.1) + residual @ hierarchical(between=sparse_allreduce)"):
        g = grace_ext.grace(text)
        assert str(g) == text and grace_ext.grace(g.to_config()) == g
    quoted = grace_ext.grace("topk(ratio=0.1) + residual @ hierarchical(between='reduce_scatter(feedback=False)')")
    assert grace_ext.grace(str(quoted)) == quoted and quoted.communicator.between.feedback is False


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("topk @ hierarchical(between=allreduce)", "cannot be summed"),
        ("topk @ hierarchical(between=hierarchical)", "cannot be hierarchical"),
        ("efsignsgd @ hierarchical(between=reduce_scatter)", "keeps a residual"),
        ("powersgd @ hierarchical(between=broadcast)", "rounds of its own"),
    ],
)
def test_what_cannot_work_is_refused(text, why):
    with pytest.raises(IncompatiblePartsError, match=why):
        grace_ext.grace(text)


def test_bad_values_are_refused():
    with pytest.raises(ParameterError, match="between must be a communicator or None"):
        grace_ext.grace("topk @ hierarchical(between=3)")
    for wrong in (0, 1.5, True):
        with pytest.raises(ParameterError, match="ranks_per_node must be a whole number"):
            grace_ext.LocalCluster(grace_ext.grace("none"), 4, ranks_per_node=wrong)


def test_an_engine_without_groups_is_refused():
    class Bare(Transport):
        rank, size, ops = 0, 2, None
        start = wait = None

    with pytest.raises(UnsupportedError, match="'hierarchical', which are not available here"):
        Driver(grace_ext.grace("topk + residual @ hierarchical"), None, Bare())
