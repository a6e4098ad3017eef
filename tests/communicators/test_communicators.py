"""Communicators that do more than carry payloads: they average and recompress shards, add up regions, count votes. Compared with float64
oracles, and with the bytes that are really sent."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.communicators.shards import FEWEST, shard_of, shards
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts.requests import Gather, Scatter
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS, same_bits, states, tapped

from ..oracles import oracles


def runs(*sizes: int):
    """Parametrizes a test: the reference library at all these world sizes, the other libraries at 3."""
    cases = [pytest.param(w, n, id=f"{w.name}-{n}") for w in WORLDS for n in (sizes if w is NUMPY else (3,))]
    return pytest.mark.parametrize(("world", "size"), cases)


EVERY, RUNS = runs(1, 2, 3, 4, 5), runs(1, 2, 5)
SHAPES = {"two": (2,), "three": (3,), "seven": (7,), "vector": (193,), "matrix": (24, 18)}  # some have d < n
RATES = (0.1, 0.1, 0.05, 0.025, 0.2)


@pytest.fixture(params=["whole", "cut"])
def cut(request):
    """Runs a test twice: with small tensors whole, as they are, and cut as large ones are."""
    if request.param == "cut":
        request.getfixturevalue("small_shards")
    return request.param


# --- compressors of one vector, in float64 -----------------------------------------------------------------------------
def scaled_sign(block):
    def compress(x):
        out = np.zeros_like(x)
        for at in range(0, x.size, block or x.size):
            piece = x[at : at + (block or x.size)]
            out[at : at + piece.size] = np.abs(piece).mean() * np.where(piece >= 0, 1.0, -1.0)
        return out

    return compress


def largest(ratio):
    return lambda x: oracles.topk(ratio)([x])[1][0]


ONES = {
    "efsignsgd": scaled_sign(None),
    "efsignsgd(block=20)": scaled_sign(20),
    "topk(ratio=0.3)": largest(0.3),
    "none": lambda x: x,
    "bf16": oracles.half("bfloat16"),
}


class TwoWay:
    """Computes per shard: the mean of the ranks' compressed shards, plus the shard's own residual, compressed again."""

    def __init__(self, compress, name, d, n, feedback, follow_rate=False):
        self.compress, self.shards = compress, shards(name, d, n)
        self.lost, self.before = np.zeros(d), None
        self.feedback, self.follow_rate = feedback, follow_rate

    def __call__(self, p, lr):
        sent, result = [np.zeros_like(x) for x in p], np.zeros_like(p[0])
        for shard in self.shards.values():
            for x, s in zip(p, sent, strict=True):
                s[shard] = self.compress(x[shard])
            whole = sum(s[shard] for s in sent) / len(p)
            if self.feedback:
                ratio = self.before / lr if self.follow_rate and self.before else 1.0
                whole = whole + ratio * self.lost[shard]
            result[shard] = self.compress(whole)
            if self.feedback:
                self.lost[shard] = whole - result[shard]
        self.before = lr
        return result, sent


@EVERY
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("knobs", ["", "(feedback=False)", "(follow_rate=True)"])
@pytest.mark.parametrize("text", ONES)
def test_reduce_scatter(world, text, knobs, memory, size, cut):
    """reduce_scatter matches the equations for every element, even with fewer elements than ranks. The second stage has its own residual;
    a knob sets its units. In GRACE (bug 14), the all-to-all pads the last shard with uninitialised memory, which enters the second stage's
    scale, and drops the second stage's error."""
    g = grace_ext.grace(f"{text} + {memory} @ reduce_scatter{knobs}")
    cluster, sizes = world.cluster(g, size), {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    dense = {name: g.parts_for(TensorSpec(name, SHAPES[name]))[0].name == "none" for name in SHAPES}
    feedback, follow = "False" not in knobs and text != "none", "follow" in knobs
    runs = {
        name: TwoWay(ONES["none" if dense[name] else text], name, d, size, feedback and not dense[name], follow)
        for name, d in sizes.items()
    }
    residuals = {name: [np.zeros(d)] * size for name, d in sizes.items()}
    for step, lr in enumerate(RATES):
        given = inputs.ranks(size, step, shapes=SHAPES)
        got = world.everywhere(cluster, given, lr)
        assert all(same_bits(got[0], other) for other in got[1:])
        for name, run in runs.items():
            p = [g[name].astype(np.float64).reshape(-1) + e for g, e in zip(given, residuals[name], strict=True)]
            if text == "bf16":  # bf16 rounds the float32 value
                p = [x.astype(np.float32).astype(np.float64) for x in p]
            wanted, sent = run(p, lr)
            if memory == "residual":
                residuals[name] = [x - s for x, s in zip(p, sent, strict=True)]
            limit = 0.02 if text == "bf16" else 1e-5  # a difference in the last bit of float32 may give another bfloat16
            assert np.abs(got[0][name].reshape(-1) - wanted).max() <= limit * max(1, np.abs(wanted).max()), (name, step)
    if feedback and text != "bf16":
        for rank, held in enumerate(states(cluster, world)):
            for name, run in runs.items():
                if run.feedback:
                    own = held[f"shard_residual/{name}"]
                    assert np.allclose(own, run.lost[shard_of(name, sizes[name], size, rank)], atol=1e-4), (name, rank)


@EVERY
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_dist_ef_block_both_ways(world, size, momentum, nesterov, cut):
    """dist-EF-blockSGD with one server per shard matches its equations on models: workers send C(u + lr_before/lr e), servers
    C(mean + lr_before/lr E)."""
    spec = f"efsignsgd(block=20) + dist_ef_block(momentum={momentum}, nesterov={nesterov}) @ reduce_scatter(follow_rate=True)"
    cluster, d = world.cluster(grace_ext.grace(spec), size), 193
    compress = scaled_sign(20)
    x = real = np.zeros(d)
    m, e, server, before = np.zeros((size, d)), np.zeros((size, d)), np.zeros(d), None
    for step, lr in enumerate((*RATES, 0.2, 0.01)):
        g = np.array([one["w"] for one in inputs.ranks(size, step, shapes={"w": (d,)})], np.float64)
        ratio = 1.0 if before is None else before / lr
        m = momentum * m + g
        p = (g + momentum * m if nesterov else m) + ratio * e
        update = np.zeros(d)
        for shard in shards("w", d, size).values():
            sent = np.array([compress(row[shard]) for row in p])
            e[:, shard] = p[:, shard] - sent
            whole = sent.mean(axis=0) + ratio * server[shard]
            update[shard] = compress(whole)
            server[shard] = whole - update[shard]
        x, before = x - lr * update, lr
        out = world.step(cluster, [{"w": row.astype(np.float32)} for row in g], lr)["w"]
        real = real - lr * out.astype(np.float64)
        assert np.abs(out - update).max() <= 3e-5 * np.abs(update).max(), step
    assert np.allclose(x, real, atol=1e-4)


@EVERY
@pytest.mark.parametrize("text", ["signsgd", "signsgd(ties='plus')", "signum", "signum(momentum=0.5, ties='plus')"])
@pytest.mark.parametrize("communicator", ["reduce_scatter", "allreduce", "broadcast"])
@pytest.mark.parametrize("memory", ["none", "residual"])
def test_votes_are_the_same_however_they_are_counted(world, text, communicator, memory, size, cut):
    """Votes counted per shard, by integer sums or by broadcasts equal those of allgather bit for bit, with ties, abstentions and state. In
    GRACE (bug 6), all-reduce adds up bytes of signs, and gives 2 count - 1."""
    reference, other = (world.cluster(grace_ext.grace(f"{text} + {memory} @ {c}"), size) for c in ("allgather", communicator))
    for step in range(4):
        given = inputs.ranks(size, step, shapes=SHAPES)
        if step == 2:
            given[-1] = {name: 0 * x for name, x in given[-1].items()}  # this rank votes only by its residual
        returned = world.everywhere(other, given)
        expected = world.step(reference, given)
        assert all(same_bits(one, expected) for one in returned)
    mine = [{k: v for k, v in held.items() if not k.startswith("shard")} for held in states(other, world)]
    if communicator != "reduce_scatter" or memory == "none":  # with shards, a shard of zeros casts no vote, so states may differ
        assert all(same_bits(a, b) for a, b in zip(mine, states(reference, world), strict=True))


SPARSE = ("topk(ratio=0.1)", "topk(ratio=0.1, values='fp16')", "threshold(threshold=1)", "threshold(threshold=0)", "topk(ratio=1)",
          "threshold(threshold=100)")  # fmt: skip


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual", "dgc"])
@pytest.mark.parametrize("text", SPARSE)
def test_sparse_allreduce_equals_allgather(world, text, memory, size, cut):
    """Results are equal up to the rounding of one division, and states are equal; also if d < n, and if nothing or all is sent."""
    gathered, reduced = (world.cluster(grace_ext.grace(f"{text} + {memory} @ {c}"), size) for c in ("allgather", "sparse_allreduce"))
    for step in range(3):
        given = inputs.ranks(size, step, shapes=SHAPES)
        expected = world.step(gathered, given)
        returned = world.everywhere(reduced, given)
        assert all(same_bits(returned[0], one) for one in returned[1:])
        for name, x in expected.items():
            assert (np.abs(returned[0][name] - x) <= np.spacing(np.abs(x))).all(), name
    assert all(same_bits(a, b) for a, b in zip(states(gathered, world), states(reduced, world), strict=True))


# --- bytes -------------------------------------------------------------------------------------------------------------
def travelled(seen, size: int) -> float:
    """Returns the bytes that one rank sends to others, the mean over ranks: in a gather its message to each of them, in an all-to-all the
    others' pieces, in a ring all-reduce 2 (n - 1) / n of its array."""
    total = 0.0
    for s in seen:
        part = {"allgather": size - 1, "broadcast": size - 1, "alltoall": (size - 1) / size, "allreduce": 2 * (size - 1) / size}
        total += part[s.kind] * sum(s.nbytes) / size
    return total


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    "spec",
    [
        "efsignsgd + residual @ allgather", "efsignsgd + residual @ broadcast", "efsignsgd(block=64) + residual @ reduce_scatter",
        "topk(ratio=0.1) + residual @ allgather", "topk(ratio=0.1) + residual @ reduce_scatter", "qsgd(bits=4) + none @ reduce_scatter",
        "none + none @ allreduce", "randomk(ratio=0.1) + residual @ allreduce", "powersgd(rank=2) + residual @ allreduce",
        "signsgd + none @ allgather", "lqsgd + residual @ allgather", "lqsgd(rank=100) + residual @ reduce_scatter",
    ],
)  # fmt: skip
def test_bytes_sent_is_what_travels(spec, size):
    """The formula of each communicator predicts the bytes on the wire, up to the headers of a large tensor."""
    g, shape = grace_ext.grace(spec), (300, 400)
    cluster = NUMPY.cluster(g, size)
    with tapped() as seen:
        NUMPY.step(cluster, inputs.ranks(size, 0, shapes={"w": shape}))
    tensor = TensorSpec("w", shape)
    said = g.communicator.bytes_sent(size, g.compressor.nbytes(tensor), tensor.nbytes)
    assert abs(travelled(seen, size) / said - 1) < 0.12, (travelled(seen, size), said)


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_lqsgd_by_reduce_scatter_sends_less_than_powersgd(size):
    """At any number of ranks, as its all-to-all and its gather carry each factor once, in codes, which gathers of all ranks' do not."""
    travels, shape = {}, {f"w{i}": (300, 200) for i in range(8)}
    for spec in ("powersgd(rank=4) + residual", "lqsgd(rank=4) + residual", "lqsgd(rank=4) + residual @ reduce_scatter"):
        g = grace_ext.grace(spec)
        with tapped() as seen:
            NUMPY.step(NUMPY.cluster(g, size), inputs.ranks(size, 0, shapes=shape))
        travels[spec] = travelled(seen, size)
    dense, gathered, scattered = travels.values()
    assert 0.24 < scattered / dense < 0.33 and (gathered < dense) == (size < 8), travels


@pytest.mark.parametrize("size", [2, 3, 5])
def test_bytes_of_counted_votes(size):
    """An all-reduce sends a byte per element; reduce_scatter sends one bit per element, and returns two."""
    shape = {"w": (300, 400)}
    sent = {}
    for communicator in ("allgather", "allreduce", "reduce_scatter"):
        with tapped() as seen:
            NUMPY.step(NUMPY.cluster(grace_ext.grace(f"signsgd + none @ {communicator}"), size), inputs.ranks(size, 0, shapes=shape))
        sent[communicator] = travelled(seen, size)
    d = 120_000
    share = (size - 1) / size
    assert abs(sent["allgather"] / ((size - 1) * d / 8) - 1) < 0.01
    assert abs(sent["allreduce"] / (2 * share * d) - 1) < 0.01
    assert abs(sent["reduce_scatter"] / (share * d / 8 + (size - 1) / size * d / 4) - 1) < 0.01


@pytest.mark.parametrize("size", [3, 5])
def test_sparse_allreduce_pays_where_supports_coincide(size):
    """With equal positions on all ranks it sends less than allgather, by the formula's factor; with others at most its declared bound."""
    d, k = 100_000, 1000
    generator = np.random.default_rng(0)
    same = np.sort(generator.permutation(d)[:k])
    amounts = {}
    for kind in ("same", "apart"):
        for communicator in ("allgather", "sparse_allreduce"):
            given = []
            for rank in range(size):
                x = np.zeros(d, np.float32)
                x[same if kind == "same" else np.random.default_rng(rank).permutation(d)[:k]] = 1 + generator.random(k)
                given.append({"w": x})
            with tapped() as seen:
                NUMPY.step(NUMPY.cluster(grace_ext.grace(f"topk(ratio=0.01) + none @ {communicator}"), size), given)
            amounts[kind, communicator] = travelled(seen, size)
    payload = grace_ext.grace("topk(ratio=0.01) + none").compressor.nbytes(TensorSpec("w", (d,)))
    share = (size - 1) / size
    assert amounts["same", "sparse_allreduce"] < 0.75 * amounts["same", "allgather"]
    assert abs(amounts["same", "sparse_allreduce"] / (2 * share * payload) - 1) < 0.15
    bound = grace_ext.communicators.get("sparse_allreduce")().bytes_sent(size, payload, 4 * d)
    assert amounts["apart", "sparse_allreduce"] <= 1.1 * bound


# --- refusals, and GRACE's bugs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["topk", "threshold", "qsgd", "efsignsgd", "lqsgd", "topk > qsgd"])
def test_allreduce_refuses_what_cannot_be_added(text):
    """In GRACE (bug 6), all-reduce takes any compressor, and adds up indices, codes and scales."""
    with pytest.raises(IncompatiblePartsError, match="allgather"):
        grace_ext.grace(f"{text} + residual @ allreduce")


@pytest.mark.parametrize("text", ["threshold", "threshold > fp16"])
def test_reduce_scatter_refuses_sizes_that_vary(text):
    """Every rank must know in advance how many bytes arrive. A pipeline of fixed size is accepted."""
    assert grace_ext.grace("topk > qsgd + residual @ reduce_scatter")
    with pytest.raises(IncompatiblePartsError, match="size varies.*sparse_allreduce"):
        grace_ext.grace(f"{text} + residual @ reduce_scatter")


@pytest.mark.parametrize("text", ["randomk", "efsignsgd", "qsgd", "topk > sign", "powersgd", "none"])
def test_sparse_allreduce_refuses_what_is_not_plain_values_at_positions(text):
    with pytest.raises(IncompatiblePartsError):
        grace_ext.grace(f"{text} + none @ sparse_allreduce")


@RUNS
@pytest.mark.parametrize("text", ["threshold(threshold=1)", "topk(ratio=0.1)", "efsignsgd", "none", "signsgd"])
def test_broadcast_takes_payloads_of_any_size(world, text, size):
    """The result equals allgather's, bit for bit. In GRACE (bug 15), broadcast lacks its rank, and sizes for payloads that vary."""
    both = [world.cluster(grace_ext.grace(f"{text} + residual @ {c}"), size) for c in ("allgather", "broadcast")]
    for step in range(2):
        given = inputs.ranks(size, step, shapes=SHAPES)
        given[0]["vector"] = given[0]["vector"] / 100  # nothing reaches the threshold
        assert same_bits(*(world.step(cluster, given) for cluster in both))


@pytest.mark.parametrize("communicator", ["allgather", "allreduce", "reduce_scatter"])
def test_signum_keeps_a_copy(world, communicator):
    """Momentum is a copy. In GRACE (bug 13) it is a view of the gradient, so a result that is copied into the gradient changes it."""
    clean, used = (world.cluster(grace_ext.grace(f"signum + none @ {communicator}"), 2) for _ in range(2))
    for step in range(4):
        given = inputs.ranks(2, step, shapes={"w": (50,)})
        tensors = world.tensors(inputs.ranks(2, step, shapes={"w": (50,)}))
        out = used.step(tensors)
        for one in tensors if world.mutable else ():
            one["w"][...] = out["w"]  # as dawn.py does
        assert np.array_equal(world.array(out["w"]), world.step(clean, given)["w"])
        assert all(same_bits(a, b) for a, b in zip(states(clean, world), states(used, world), strict=True))


def test_ranks_without_a_shard_are_sent_nothing(cut):
    """Of a tensor that is not cut, or has fewer elements than there are ranks, requests have no payloads for ranks without a shard, and
    expect none from them."""
    g = grace_ext.grace("efsignsgd + none @ reduce_scatter")
    spec = TensorSpec("w", (3,))
    owners = {"whole": [4], "cut": [1, 3, 4]}[cut]
    info = StepInfo(step=0, rank=4, size=5, divisor=5)
    assert g.communicator.input_bytes(g.compressor, spec, 5) == len(owners) * 5 + 5
    state = g.communicator.init(NUMPY.ops, g.compressor, spec, info)
    run = g.communicator.exchange(NUMPY.ops, g.compressor, np.ones(3, np.float32), spec, info, state)
    request = next(run)
    assert isinstance(request, Scatter) and list(request.payloads) == list(request.fields) == owners
    request = run.send([request.payloads[4]] * 5)
    assert isinstance(request, Gather) and list(request.by_rank) == owners


# --- shards ------------------------------------------------------------------------------------------------------------
def test_shards():
    """Shards follow one another in rank order, are of one size, and have at least FEWEST elements; a smaller tensor is one shard."""
    for d in (1, 5, FEWEST - 1, FEWEST, 2 * FEWEST - 1, 3 * FEWEST + 1, 40 * FEWEST + 7):
        for n in (1, 2, 3, 5, 32, 1000):
            for name in ("w", "layer.0.bias", "\N{GREEK SMALL LETTER GAMMA}"):
                found = shards(name, d, n)
                assert list(found) == sorted(found) and 0 <= min(found) and max(found) < n
                assert len(found) == max(1, min(n, d // FEWEST))
                ends = [shard.stop for shard in found.values()]
                assert [shard.start for shard in found.values()] == [0, *ends[:-1]] and ends[-1] == d
                assert max(np.diff([0, *ends])) - min(np.diff([0, *ends])) <= 1
                assert shard_of(name, d, n, -1) == slice(0, 0)


@pytest.mark.parametrize("name", ["p{}", "layers.{}.weight", "encoder/layer_{}/kernel:0"])
@pytest.mark.parametrize("d", [100, 3 * FEWEST])
def test_all_ranks_own_about_as_much(name, d):
    """Of many tensors with usual names, every rank owns about its part."""
    for n in (2, 8, 32):
        owned = np.zeros(n)
        for i in range(2000):
            for rank, shard in shards(name.format(i), d, n).items():
                owned[rank] += shard.stop - shard.start
        assert 0.5 < owned.min() / owned.mean() and owned.max() / owned.mean() < 1.75, (n, owned)
