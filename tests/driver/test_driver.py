"""The driver gives the same starts and results for any order of gradients and any interleaving of ranks, and stays usable after errors."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

import grace_ext
from grace_ext.driver.driver import Driver
from grace_ext.exchange.perform import perform
from grace_ext.exchange.transport import Transport
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits

from .. import catalog
from .hub import OPS, Concatenating, Hub, Native, Poor, perform_collective, step

SHAPES = {"a": (40,), "b": (24, 18), "empty": (0, 3), "c": (), "d": (7,), "e": (33, 17), "f": (300,)}
SPECS = [TensorSpec(name, shape) for name, shape in SHAPES.items()]
MIXES = (
    "topk(ratio=0.2) + residual",
    "threshold(threshold=1) + residual @ broadcast",
    "powersgd + residual",
    "fp16 + residual",
    "randomk(ratio=0.2) + residual",
    "none",
)


def drivers(spec: str, size: int, transport=Native, bucket_bytes: int = 1000, specs=SPECS) -> list[Driver]:
    made = [Driver(grace_ext.grace(spec), OPS, transport(rank, size), bucket_bytes=bucket_bytes) for rank in range(size)]
    for driver in made:
        driver.register(specs)
    return made


def run(made, gradients, orders, seed: int = 0):
    """Makes one step on all ranks. Returns ([result by rank], hub)."""
    hub = Hub([driver.transport for driver in made], seed)
    results = hub.run([step(d, g, order) for d, g, order in zip(made, gradients, orders, strict=True)])
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results, hub


def state(driver: Driver) -> dict[str, np.ndarray]:
    return {key: np.array(array) for key, array in driver.state_dict()["state"].items()}


def shuffled(size: int, seed: int, names=tuple(SHAPES)) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.sample(list(names), len(names)) for _ in range(size)]


LOWERED = (
    *MIXES,
    "topk(ratio=0.2, values='fp16') + residual @ broadcast",
    "randomk(ratio=0.25, values='fp16') + none @ allreduce",
    "threshold(threshold=1) + residual @ allgather",
    "bf16 + residual @ broadcast",
    "qsgd + none",
    "signsgd + residual",
)


@pytest.mark.parametrize(
    ("transport", "spec"), [(Native, s) for s in catalog.FEEDBACK] + [(t, s) for t in (Poor, Concatenating) for s in LOWERED]
)
def test_order_buckets_and_lowering_do_not_matter(spec, transport):
    """With gradients in shuffled orders, ranks interleaved at random, and engines that lack collectives, all ranks make the same starts.
    Results and states have the bits of a LocalCluster with other buckets."""
    size = 3
    made = drivers(spec, size, transport)
    cluster = NUMPY.cluster(grace_ext.grace(spec), size)
    assert len(made[0].buckets) == 1 if cluster.grace.compressor.whole_model else len(made[0].buckets) > 3
    for turn in range(2):
        gradients = inputs.ranks(size, turn, shapes=SHAPES)
        results, hub = run(made, gradients, shuffled(size, turn), seed=turn)
        assert hub.starts[0] == hub.starts[1] == hub.starts[2]
        expected = NUMPY.step(cluster, gradients)
        for driver, result, simulated in zip(made, results, cluster.drivers, strict=True):
            assert same_bits(result, expected) and list(result) == list(SHAPES)
            assert same_bits(state(driver), state(simulated))


@pytest.mark.parametrize("transport", [Native, Poor, Concatenating], ids=lambda t: t.__name__)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_lowering_in_other_dtypes(transport, dtype):
    """16-bit gradients need 16-bit sums, which no engine rounds as we do, so they are lowered; mixed dtypes share a bucket."""
    size = 3
    mixed = {**SHAPES, "g": (5,)}
    for spec in ("none", "powersgd + residual", "threshold(threshold=1) + residual"):
        gradients = [inputs.normal(rank, 0, dtype, mixed) for rank in range(size)]
        for one in gradients:
            one["g"] = one["g"].astype(np.float32)
        specs = [TensorSpec(name, a.shape, a.dtype.name) for name, a in gradients[0].items()]
        results, _ = run(drivers(spec, size, transport, specs=specs), gradients, shuffled(size, 3, mixed))
        expected = NUMPY.step(NUMPY.cluster(grace_ext.grace(spec), size), gradients)
        assert all(same_bits(result, expected) for result in results)


def test_starts_do_not_depend_on_who_is_late():
    """The sequence of starts is the same for any interleaving of ranks and any order of gradients."""
    for spec in MIXES:
        sequences = set()
        for seed in range(4):
            made = drivers(spec, 2)
            for driver in made:
                driver.agreed = True
            _, hub = run(made, inputs.ranks(2, 0, shapes=SHAPES), shuffled(2, seed), seed)
            sequences.update(tuple(names) for names in hub.starts)
        assert len(sequences) == 1, spec


def test_communication_overlaps_the_backward_pass():
    """From the second step on, a bucket starts in the `put` that completes it, and nothing waits before `finish`."""
    (driver,) = drivers("topk(ratio=0.2) + residual", 1)
    gradients = inputs.normal(0, 0, shapes=SHAPES)
    backward = [spec.name for bucket in driver.buckets for spec in bucket.specs]
    assert backward == list(reversed(SHAPES))
    assert all(not list(driver.put(name, gradients[name])) for name in backward)  # the first step starts nothing
    Hub([driver.transport]).run([driver.finish()])
    started = [[type(effect).__name__ for effect in driver.put(name, gradients[name])] for name in backward]
    assert started[0] == ["Start"] and {kind for kinds in started for kind in kinds} == {"Start"}
    assert sum(map(len, started)) == len(driver.buckets)


def test_a_bucket_never_overtakes():
    """A complete bucket waits for those before it, so that all ranks start buckets in the same order, whatever the order of gradients."""
    (driver,) = drivers("none", 1)
    driver.agreed = True
    gradients = inputs.normal(0, 0, shapes=SHAPES)
    last = [spec.name for spec in driver.buckets[-1].specs]
    assert all(not list(driver.put(name, gradients[name])) for name in last)


def test_parameters_without_a_gradient_take_part_as_zeros():
    """If a parameter has no gradient on one rank (a branch not taken), or on all ranks, it counts as zeros in the mean."""
    for spec in MIXES:
        made, reference = drivers(spec, 2), drivers(spec, 2)
        for turn in range(2):
            full = inputs.ranks(2, turn, shapes=SHAPES)
            full[0]["b"] = np.zeros_like(full[0]["b"])
            for one in full:
                one["a"] = np.zeros_like(one["a"])
            orders = [[n for n in SHAPES if n not in ("a", "b")], [n for n in SHAPES if n != "a"]]
            got, _ = run(made, full, orders, turn)
            expected, _ = run(reference, full, shuffled(2, turn), turn)
            assert all(same_bits(g, e) for g, e in zip(got, expected, strict=True)), spec


@pytest.mark.parametrize("bucket_bytes", [1, 200, 5000, 10**9])
def test_buckets(bucket_bytes):
    """Each parameter is in one bucket, last first; only a bucket of one parameter may exceed the limit; results do not depend on it."""
    for spec in ("topk(ratio=0.2) + residual", "powersgd + residual", "fp16 + none"):
        made = drivers(spec, 2, bucket_bytes=bucket_bytes)
        buckets = [[s.name for s in b.specs] for b in made[0].buckets]
        assert [name for bucket in buckets for name in bucket] == list(reversed(SHAPES))
        assert all(len(b.specs) == 1 or sum(s.nbytes for s in b.specs) <= bucket_bytes for b in made[0].buckets)
        gradients = inputs.ranks(2, 0, shapes=SHAPES)
        results, _ = run(made, gradients, shuffled(2, 0))
        assert same_bits(results[1], NUMPY.step(NUMPY.cluster(grace_ext.grace(spec), 2), gradients))


@pytest.mark.parametrize("spec", MIXES)
def test_a_bad_bucket_leaves_the_others_their_results(spec):
    """If one bucket has a NaN, every rank returns NaN for it and normal aggregates for the others, and commits no state at all."""
    made, clean = drivers(spec, 2), drivers(spec, 2)
    for turn in range(2):
        gradients = inputs.ranks(2, turn, shapes=SHAPES)
        for group in (made, clean):
            run(group, gradients, shuffled(2, turn))
    held = [state(driver) for driver in made]
    gradients = inputs.ranks(2, 2, shapes=SHAPES)
    expected, _ = run(clean, gradients, shuffled(2, 2))
    gradients[1]["e"] = gradients[1]["e"].copy()
    gradients[1]["e"][0, 0] = np.nan
    results, _ = run(made, gradients, shuffled(2, 2))
    (bucket,) = (b for b in made[0].buckets if "e" in [s.name for s in b.specs])
    travelling = {s.name for s in bucket.specs if s.size}
    assert len(travelling) < 5
    for result in results:
        for name in SHAPES:
            if name in travelling:
                assert np.isnan(result[name]).all()
            else:
                assert result[name].tobytes() == expected[0][name].tobytes(), name
    assert all(same_bits(a, state(driver)) for a, driver in zip(held, made, strict=True))
    assert [driver.step for driver in made] == [3, 3]


def test_two_models_at_once_do_not_share_names():
    """The collectives of two drivers in one process have different names."""
    first, second = drivers("none", 2), drivers("topk + residual", 2)
    gradients = inputs.ranks(2, 0, shapes=SHAPES)
    starts = []
    for made in (first, second, first, second):
        _, hub = run(made, gradients, shuffled(2, 0))
        starts.append({name for name in hub.starts[0] if "agree" not in name})
    assert starts[0] == starts[2] and starts[1] == starts[3] and not starts[0] & starts[1]


class Threaded(Transport):
    """A blocking engine whose ranks are threads; collectives are matched by name and turn."""

    gathers_uneven = True

    def __init__(self, rank: int, size: int, board: dict, changed: threading.Condition):
        self.rank, self.size, self.ops, self.board, self.changed = rank, size, OPS, board, changed
        self.turns: dict[str, int] = {}

    def start(self, collective, name):
        with self.changed:
            turn = self.turns[name] = self.turns.get(name, -1) + 1
            self.board.setdefault((name, turn), {})[self.rank] = collective
            self.changed.notify_all()
        return name, turn

    def wait(self, handle):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.board[handle]) == self.size, timeout=30), f"nobody joins {handle}"
            return perform_collective([self.board[handle][rank] for rank in range(self.size)], self.rank)


def test_perform_on_threads():
    """The driver gives the same results on a blocking transport: three threads, shuffled orders, three steps."""
    size, board, changed = 3, {}, threading.Condition()
    made = [
        Driver(grace_ext.grace("powersgd + residual"), OPS, Threaded(rank, size, board, changed), bucket_bytes=1000) for rank in range(size)
    ]
    outs: list[list] = [[] for _ in range(size)]

    def work(rank: int) -> None:
        made[rank].register(SPECS)
        for turn in range(3):
            handles: dict = {}
            gradients = inputs.normal(rank, turn, shapes=SHAPES)
            for name in shuffled(size, turn)[rank]:
                perform(made[rank].put(name, gradients[name]), made[rank].transport, handles)
            outs[rank].append(perform(made[rank].finish(), made[rank].transport, handles))
            assert not handles

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    cluster = NUMPY.cluster(grace_ext.grace("powersgd + residual"), size)
    for turn in range(3):
        expected = NUMPY.step(cluster, inputs.ranks(size, turn, shapes=SHAPES))
        assert all(same_bits(outs[rank][turn], expected) for rank in range(size))
