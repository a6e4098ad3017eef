"""What a step costs besides its work on elements: calls, and objects that Python's garbage collector looks at. Counted, not timed."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest

import grace_ext
from grace_ext.communicators.shards import FEWEST
from grace_ext.exchange.effects import Start
from grace_ext.testing.worlds import NUMPY

SHARDED = [
    "efsignsgd + residual @ reduce_scatter", "qsgd(bits=4) + none @ reduce_scatter", "signsgd + none @ reduce_scatter",
    "topk(ratio=0.1) + residual @ sparse_allreduce",
]  # fmt: skip
STEPS = 2  # before counting: caches are full then


def gradients(tensors: int, ranks: int, elements: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{f"p{i}": rng.standard_normal(elements, np.float32) for i in range(tensors)} for _ in range(ranks)]


def calls(spec: str, tensors: int, ranks: int, elements: int) -> float:
    """Returns the calls of one rank in one step, Python's and C's: the mean over the ranks."""
    cluster, given = NUMPY.cluster(grace_ext.grace(spec), ranks), gradients(tensors, ranks, elements)
    for _ in range(STEPS):
        cluster.step(given)
    count = 0

    def counted(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        cluster.step(given)
    finally:
        sys.setprofile(before)
    return count / ranks


@pytest.mark.parametrize("spec", SHARDED)
def test_calls_grow_with_tensors_plus_ranks(spec):
    """Each tensor takes some calls, and each rank takes some, but not each rank for each tensor: of small tensors a rank sums up a few for
    all ranks, not a shard of every one. When each tensor was cut for all ranks, that took about 190 calls for each."""
    few, many = (2, 16), (10, 40)
    found = {(tensors, ranks): calls(spec, tensors, ranks, 100) for tensors in many for ranks in few}
    product = found[40, 16] - found[40, 2] - found[10, 16] + found[10, 2]
    assert product / ((16 - 2) * (40 - 10)) < 5, found
    assert found[40, 16] < 1.3 * found[40, 2], found


@pytest.mark.parametrize("spec", SHARDED)
def test_calls_of_a_large_tensor_are_bounded_by_its_elements(spec):
    """A tensor is cut into as many shards as have FEWEST elements: more ranks than that do not cost more calls."""
    three, many = (calls(spec, 4, ranks, 3 * FEWEST) for ranks in (3, 16))
    assert many < 1.3 * three


def held(spec: str, tensors: int) -> int:
    """Returns how many objects the garbage collector tracks more when a bucket waits for the network than before the step."""
    cluster, given = NUMPY.cluster(grace_ext.grace(spec), 1), gradients(tensors, 1, FEWEST + 1)  # too large to be merged
    for _ in range(STEPS):
        cluster.step(given)
    effects = cluster.drivers[0].exchange(given[0])
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # it stops tracking tuples of plain values
    try:
        before = len(gc.get_objects())
        while not isinstance(effects.send(None), Start):
            pass
        return len(gc.get_objects()) - before
    finally:
        effects.close()
        if enabled:
            gc.enable()


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("none @ allreduce", 14),
        ("qsgd(bits=4) + none", 14),
        ("topk(ratio=0.01) + residual", 14),
        ("topk(ratio=0.1) + ef21", 13),
        ("powersgd(rank=2) + residual", 18),
        ("efsignsgd + residual @ reduce_scatter", 19),
        ("topk(ratio=0.1) + residual @ sparse_allreduce", 20),
    ],
)
def test_a_waiting_tensor_holds_few_objects(spec, most):
    """A model of 5,000 tensors has as many times this many objects alive at once, and the garbage collector starts by their number."""
    assert (held(spec, 60) - held(spec, 20)) / 40 <= most
