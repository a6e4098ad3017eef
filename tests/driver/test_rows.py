"""Matrices whose rows several ranks of a replica hold: exchanged by PowerSGD as one, whatever the cut, and whoever is ahead."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import libraries
from grace_ext.composition.sharing import check_sharing, shares_rows
from grace_ext.driver.driver import Driver
from grace_ext.errors import ParameterError, UnsupportedError
from grace_ext.exchange.effects import Start, Wait
from grace_ext.exchange.lockstep import LockstepTransport, execute
from grace_ext.exchange.transport import Transport
from grace_ext.parts.tensor import Rows, TensorSpec
from grace_ext.testing.worlds import NUMPY, WITH_DEVICE

#: The libraries without kernels, that of the pretended device among them.
PLAIN = [world for world in WITH_DEVICE if world.name in ("numpy-plain", "torch-device", "torch-cuda")]
POWERSGD = "powersgd(rank=2) + residual"
#: Of 40 x 30, 23 x 50 (uneven shards) and 5 x 4 x 30 (fewer rows than some cuts have shards); vectors are never shared.
SHAPES = {"a": (40, 30), "bias": (23,), "b": (23, 50), "c": (5, 4, 30)}


class Engine(LockstepTransport):
    """A rank of an engine that lacks collectives, as torch.distributed does."""

    carry = Transport.carry


def cut_in(shards, count):
    """Returns the rows of each shard, as fully_shard cuts them: the last ones may have none."""
    size = -(-count // shards)
    return tuple(max(0, min(size, count - shard * size)) for shard in range(shards))


class Replicas:
    """Simulates replicas x shards, each a driver of its own; collectives of a group are matched by their order, as torch.distributed does.
    Who is ahead differs from step to step."""

    def __init__(self, g, replicas, shards, shapes, bucket_bytes=2000, ops=None):
        self.grace = grace_ext.grace(g)
        self.ops, self.places = ops or libraries.ops_for_framework("numpy"), [(r, s) for r in range(replicas) for s in range(shards)]
        self.shapes, self.shards, self.turn = shapes, shards, np.random.default_rng(1)
        self.drivers = {}
        for r, s in self.places:
            engine = Engine(r, replicas, self.ops, replicas)
            driver = Driver(self.grace, self.ops, engine, bucket_bytes=bucket_bytes)
            driver.register(self.spec(name, s) for name in shapes)
            self.drivers[r, s] = driver

    def spec(self, name, shard):
        shape, counts = self.shapes[name], cut_in(self.shards, self.shapes[name][0])
        spec = TensorSpec(name, (counts[shard], *shape[1:]), "float32", Rows(counts, shard))
        return spec if len(shape) > 1 and shares_rows(self.grace, spec) else replace(spec, rows=None)

    def part(self, x, shard):
        counts = cut_in(self.shards, len(x))
        return np.ascontiguousarray(x[sum(counts[:shard]) : sum(counts[: shard + 1])])

    def step(self, gradients):
        """Exchanges the whole gradients of each replica. Returns, by replica, the whole results."""
        upload, host = self.ops.upload, self.ops.host
        parts = {(r, s): {n: upload(self.part(x, s)) for n, x in gradients[r].items()} for r, s in self.places}
        found = self.run({place: driver.exchange(parts[place]) for place, driver in self.drivers.items()})
        return [{n: np.concatenate([host(found[r, s][n]) for s in range(self.shards)]) for n in self.shapes} for r in range(len(gradients))]

    def run(self, effects):
        started, results = defaultdict(dict), {}  # by (group, number): the collectives of its members
        numbers, names = defaultdict(int), defaultdict(dict)
        answers, found, waiting = dict.fromkeys(effects), {}, {}
        while len(found) < len(effects):
            ready = [p for p in effects if p not in found and (p not in waiting or self.complete(started, results, waiting[p]))]
            assert ready, f"all ranks wait: {waiting}"
            place = ready[self.turn.integers(len(ready))]
            if place in waiting:
                answers[place] = results[waiting.pop(place)][place]
            try:
                effect = effects[place].send(answers[place])
            except StopIteration as stop:
                found[place] = stop.value
                continue
            answers[place] = None
            if isinstance(effect, Start):
                group = ("rows", place[0]) if effect.collective.group == "rows" else ("all", place[1])
                key = (group, numbers[place, group])
                numbers[place, group] += 1
                started[key][place] = effect.collective
                names[place][effect.name] = key
            elif isinstance(effect, Wait):
                waiting[place] = names[place].pop(effect.name)
        return found

    def complete(self, started, results, key):
        (kind, number), _ = key
        members = [p for p in self.places if p[kind == "all"] == number]
        if key not in results and len(started[key]) == len(members):
            collectives = [started[key][p] for p in members]
            assert len({(c.kind, c.dtype, c.label, c.divisor) for c in collectives}) == 1
            assert collectives[0].kind != "allreduce" or len({len(c.array) for c in collectives}) == 1
            results[key] = dict(zip(members, execute(collectives, self.ops), strict=True))
        return key in results


def gradients_of(step, replicas, rank=2, shapes=SHAPES):
    """Returns the gradients of each replica: mostly of this rank, and the same directions at all steps. (If directions of about one size
    took turns in the residual, a rounding would decide which comes first, and grow from step to step, with whole matrices, too.)"""
    lasting, rng, found = np.random.default_rng(99), np.random.default_rng(step), []
    sides = {name: (shape[0], int(np.prod(shape[1:]))) for name, shape in shapes.items()}
    bases = {name: [lasting.standard_normal((rank, n)) for n in both] for name, both in sides.items()}
    for _ in range(replicas):
        one = {}
        for name, (u, v) in bases.items():
            sizes = 4 + rng.random(rank)
            x = (u.T * sizes) @ v + 0.3 * rng.standard_normal((u.shape[1], v.shape[1]))
            one[name] = x.reshape(shapes[name]).astype(np.float32)
        found.append(one)
    return found


def off_by(got, expected):
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)) if expected.size else 0.0


@pytest.mark.parametrize("shards", [2, 3, 8])
@pytest.mark.parametrize(
    "g",
    [
        POWERSGD,
        "powersgd(rank=3, feedback='mean') + residual",
        "powersgd(rank=2, warm_start=False) + residual",
        "powersgd_plus(rank=2, refresh_period=4) + residual",
        "powersgd_plus(rank=2, refresh_period=5, refresh='randomized') + residual",
        "powersgd_plus(rank=2, refresh_period=4, refresh='gram') + residual",
        "powersgd_plus(rank=2, refresh_period=1, refresh='gram', feedback='mean') + residual",
        f"by_size(min_elements=700, small=none, large={POWERSGD})",
        f"warmup(steps=3, then={POWERSGD})",
    ],
)
def test_equals_the_exchange_of_whole_matrices(g, shards):
    """20 steps give the result, and leave the residual, of the exchange of whole matrices."""
    cluster, sharded = grace_ext.LocalCluster(g, 2), Replicas(g, 2, shards, SHAPES)
    for step in range(20):
        gradients = gradients_of(step, 2, 3 if "rank=3" in g else 2)
        expected, results = cluster.step(gradients), sharded.step(gradients)
        for name in SHAPES:
            assert off_by(results[0][name], expected[name]) < 1e-5, (step, name)
            assert results[0][name].tobytes() == results[1][name].tobytes(), (step, name)
    for r in range(2):
        for name in SHAPES:
            own = [sharded.drivers[r, s].state[name].get("residual", np.zeros(0)) for s in range(shards)]
            expected = cluster.drivers[r].state[name].get("residual", np.zeros(0))
            assert off_by(np.concatenate(own), expected) < 1e-4, name


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_vectors_of_any_length(shards):
    """Vectors beside the matrices, whose payloads' lengths are exchanged first, and which some ranks have nothing of, change no order."""
    g = f"by_size(min_elements=100, small=threshold(threshold=0.5) + residual, large={POWERSGD})"
    shapes = {f"{i}.{kind}": shape for i in range(5) for kind, shape in (("w", (20 + i, 30)), ("b", (20 + i,)), ("n", (3,)))}
    cluster, sharded = grace_ext.LocalCluster(g, 2), Replicas(g, 2, shards, shapes, bucket_bytes=200)
    assert len(sharded.drivers[0, 0].buckets) > 4
    for step in range(4):
        gradients = gradients_of(step, 2, shapes=shapes)
        expected, results = cluster.step(gradients), sharded.step(gradients)
        assert all(off_by(results[0][name], expected[name]) < 1e-5 for name in shapes)


@pytest.mark.parametrize("world", PLAIN, ids=lambda world: world.name)
def test_without_kernels(world):
    """Plain arrays, and tensors as on a GPU, give the same."""
    for g in (POWERSGD, "powersgd_plus(rank=2, refresh_period=4) + residual"):
        cluster, sharded = grace_ext.LocalCluster(g, 2), Replicas(g, 2, 8, SHAPES, ops=world.ops)
        for step in range(5):
            gradients = gradients_of(step, 2)
            expected, results = cluster.step(gradients), sharded.step(gradients)
            assert all(off_by(results[0][name], expected[name]) < 1e-5 for name in SHAPES)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_bytes(shards):
    """A replica sends r (a + b) floats per matrix, and a float per shard, bucket and round; a rank no more than its rows and its share."""
    shapes = {name: shape for name, shape in SHAPES.items() if name != "bias"}
    sharded = Replicas(POWERSGD, 2, shards, shapes)
    gradients = [{name: x for name, x in one.items() if name in shapes} for one in gradients_of(0, 2)]
    sharded.step(gradients)
    for s in range(shards):
        driver = sharded.drivers[1, s]
        promised = sum(sharded.grace.nbytes(spec) for spec in driver.specs.values())
        assert driver.wire_bytes == promised + 2 * 4 * len(driver.buckets)
    payloads = sum(d.wire_bytes - 8 * len(d.buckets) for (r, _), d in sharded.drivers.items() if r == 0)
    assert payloads == sum(4 * 2 * (shape[0] + int(np.prod(shape[1:]))) for shape in shapes.values())


def shared_buckets(replicas):
    """Returns the names in each bucket of shared matrices, which must be the same on all ranks."""
    found = [[[spec.name for spec in b.specs] for b in d.buckets if b.specs[0].rows] for d in replicas.drivers.values()]
    assert all(one == found[0] for one in found)
    return found[0]


def test_ranks_that_hold_rows_make_the_same_buckets():
    """Uneven shards fill buckets of other parameters differently, but not those of shared matrices."""
    shapes = {f"{i}.{kind}": shape for i in range(6) for kind, shape in (("w", (9, 40)), ("b", (9,)), ("n", (7,)))}
    sharded = Replicas(POWERSGD, 2, 4, shapes, bucket_bytes=900)
    assert len(shared_buckets(sharded)) > 1
    for d in sharded.drivers.values():
        assert all(len({spec.rows is None for spec in bucket.specs}) == 1 for bucket in d.buckets)
    one_is_small = Replicas(POWERSGD, 2, 2, {"b": (30, 40), "a": (33, 1000)}, bucket_bytes=10**6)  # the second shard of a
    assert shared_buckets(one_is_small) == [["b", "a"]]


@pytest.mark.parametrize("world", [NUMPY, *PLAIN], ids=lambda world: world.name)
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(world):
    """NaN in one shard of one replica: no rank commits, and all get NaN for the bucket."""
    sharded = Replicas(POWERSGD, 2, 3, SHAPES, bucket_bytes=10**6, ops=world.ops)
    sharded.step(gradients_of(0, 2))
    before = {place: driver.state for place, driver in sharded.drivers.items()}
    gradients = gradients_of(1, 2)
    gradients[1]["b"][0, 0] = np.nan
    results = sharded.step(gradients)
    for place, driver in sharded.drivers.items():
        assert not driver.committed and driver.state is before[place]
    assert all(np.isnan(result[name]).all() for result in results for name in ("a", "b", "c"))
    sharded.step(gradients_of(1, 2))
    assert all(driver.committed for driver in sharded.drivers.values())


def test_factors_that_overflow_are_kept_on_all():
    """Finite gradients whose sums are beyond float32: all ranks send nothing, and keep everything."""
    sharded = Replicas(POWERSGD, 2, 2, {"a": (40, 30)})
    huge = [{"a": np.full((40, 30), 9e36, np.float32)} for _ in range(2)]
    for driver in sharded.drivers.values():
        driver.state = {"a": {"residual": np.zeros(600, np.float32), "powersgd_q_of_whole": np.full(60, 3e37, np.float32)}}
    results = sharded.step(huge)
    assert not results[0]["a"].any()
    for driver in sharded.drivers.values():
        assert driver.committed and (driver.state["a"]["residual"] == np.float32(9e36)).all()


ROWS = TensorSpec("w", (20, 30), "float32", Rows((20, 20), 0))


@pytest.mark.parametrize(
    "g, error, says",
    [
        ("lqsgd(rank=2) + residual", ParameterError, "has neither"),
        ("topk(ratio=0.1) + residual", ParameterError, "powersgd and powersgd_plus"),
        (f"by_size(min_elements=700, small=global_topk(ratio=0.1) + residual, large={POWERSGD})", UnsupportedError, "tensor by tensor"),
    ],
)
def test_routes_that_cannot_share(g, error, says):
    with pytest.raises(error, match=says):
        check_sharing(grace_ext.grace(g))


@pytest.mark.parametrize(
    "g, says",
    [
        ("lgreco(base=powersgd(rank=2) + residual)", "decides by gradients"),
        (f"accordion(low={POWERSGD}, high=powersgd(rank=4) + residual)", "decides by gradients"),
        (f"every(n=4, then=lqsgd(rank=2) + residual, otherwise={POWERSGD})", "codes the factors of each shard by itself"),
        (f"every(n=4, then=topk(ratio=0.1) + residual, otherwise={POWERSGD})", "at some steps and share its rows at others"),
    ],
)
def test_matrices_that_cannot_share(g, says):
    with pytest.raises(UnsupportedError, match=says):
        shares_rows(grace_ext.grace(g), ROWS)


def test_what_is_sent_dense_or_otherwise_is_not_shared():
    tiny = TensorSpec("w", (2, 3), "float32", Rows((2, 1), 0))
    assert not shares_rows(grace_ext.grace(POWERSGD), tiny)
    by_name = f"by_size(min_elements=10000, small=lqsgd(rank=2) + residual, large={POWERSGD})"
    with pytest.raises(UnsupportedError, match="codes the factors"):
        shares_rows(grace_ext.grace(by_name), ROWS)
    by_size = f"by_size(min_elements=1200, small=topk(ratio=0.1) + residual, large={POWERSGD})"
    assert shares_rows(grace_ext.grace(by_size), ROWS)  # of 40 x 30: the whole counts
    half = replace(ROWS, dtype="bfloat16")
    with pytest.raises(UnsupportedError, match="bfloat16"):
        shares_rows(grace_ext.grace(f"warmup(steps=3, then={POWERSGD})"), half)
