"""Declared sizes are true: `nbytes` bounds what is sent, `fields` describe it, and `wire_bytes` counts all of it."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.exchange.message import HEADER
from grace_ext.parts.field import ITEMSIZE
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, tapped

from .. import catalog

MATRIX = TensorSpec("w", (24, 50))
SHAPES = ((), (1,), (2,), (7,), (64,), (600,), (5, 3), (24, 50), (4, 3, 5, 5))


@pytest.mark.parametrize(
    ("world", "spec", "dtype"),
    [(NUMPY, s, "float32") for s in catalog.MIXES if "beta" not in s]
    + [(NUMPY, s, dtype) for s in catalog.PLAIN for dtype in ("bfloat16", "float64")],
)
def test_wire_bytes(world, spec, dtype):
    """wire_bytes equals what each rank handed to collectives, and is at most the declared payloads plus headers and flags."""
    g, size = grace_ext.grace(spec), 2
    cluster = world.cluster(g, size)
    twice = any(leaf.compressor.rounds and leaf.communicator.name == "reduce_scatter" for leaf in g.leaves)  # an all-to-all in each round
    declared = sum(g.nbytes(TensorSpec(name, shape, dtype)) for name, shape in inputs.SHAPES.items())
    for step in range(2):
        with tapped() as seen:
            world.step(cluster, inputs.ranks(size, step, dtype))
        assert cluster.wire_bytes == [sum(s.nbytes[rank] for s in seen) for rank in range(size)]
        # A message has a header (an all-to-all has one per rank), a sum has a flag element.
        overhead = sum({"allreduce": ITEMSIZE[s.dtype], "alltoall": size * HEADER.size}.get(s.kind, HEADER.size) for s in seen)
        assert len(seen) <= 4 and overhead <= (6 if twice else 4) * HEADER.size
        assert max(cluster.wire_bytes) <= declared + overhead
        if g.compressor.fixed_size and g.memory.sends == 1 and g.compressor.mean_nbytes(MATRIX) == g.compressor.nbytes(MATRIX):
            assert max(cluster.wire_bytes) == declared + overhead or "reduce" in spec  # with shards, ranks send different amounts


@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_never_larger_than_dense(text):
    """A tensor whose payload would not be smaller is sent dense. Only compressors whose result is a vote or an exact sum, or whose size
    depends on the values, may send more, by a flag, a scale or two counts."""
    g = grace_ext.grace(f"{text} + none")
    if not g.compressor.fixed_size or g.compressor.mean_nbytes(MATRIX) != g.compressor.nbytes(MATRIX):
        pytest.skip("how much it sends is known from the values only, or differs from step to step; see its own tests")
    if g.compressor.caution is not None:
        pytest.skip("sends more than dense at every step, as was asked for, and warns of it: see its own tests")
    for dtype in inputs.DTYPES:
        for shape in SHAPES:
            tensor = TensorSpec("w", shape, dtype)
            more = 0 if g.compressor.sends_dense(tensor) else 4
            assert g.nbytes(tensor) <= tensor.nbytes + more, tensor
    assert g.nbytes(TensorSpec("w", (0, 3))) == 0


def test_sizes_of_the_documented_forms():
    """Sizes are those in the documentation, computed here from its formulas."""
    d = 1_000_000
    flat, matrix = TensorSpec("w", (d,)), TensorSpec("w", (1000, 1000))

    def nbytes(text, spec=flat):
        return grace_ext.grace(f"{text} + none").nbytes(spec)

    assert nbytes("none") == 4 * d and nbytes("fp16") == nbytes("bf16") == 2 * d
    assert nbytes("randomk(ratio=0.01)") == 4 * 10_000
    assert nbytes("signsgd") == d // 8 + 1
    assert nbytes("efsignsgd") == d // 8 + 4
    assert nbytes("efsignsgd(block=1000)") == d // 8 + 4 * 1000
    assert nbytes("qsgd(bits=4)") == d // 2 + 4 * 1954
    assert nbytes("qsgd(levels=1000)") == d * 11 // 8 + 4 * 1954
    assert nbytes("powersgd(rank=4)", matrix) == 4 * 4 * 2000
    assert nbytes("powersgd(rank=4)", flat) == 4 * d
    assert 50_000 < nbytes("topk(ratio=0.01)") < 10_000 * 5.1
    assert nbytes("topk(ratio=1)") == 4 * d


def test_threshold_sends_what_it_keeps(world):
    """The size depends on the data: if nothing reaches the threshold, 8 bytes of counts; if everything does, dense plus counts."""
    cluster = world.cluster(grace_ext.grace("threshold(threshold=1.0) + none"), 2)
    few = np.zeros(1000, np.float32)
    few[[3, 500]] = 1, -2
    world.step(cluster, [{"w": few}, {"w": np.ones(1000, np.float32)}])
    assert cluster.wire_bytes[1] == HEADER.size + 8 + 4000
    assert HEADER.size + 8 + 8 < cluster.wire_bytes[0] <= HEADER.size + 8 + 8 + 6
    world.step(cluster, [{"w": few / 8}] * 2)
    assert cluster.wire_bytes == [HEADER.size + 8] * 2
