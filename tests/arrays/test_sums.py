"""Sums and norms have the same bits in every library, with kernels and without, at ties between two floats, too."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays.sums import PIECE
from grace_ext.parts.ops import Feedback
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import NUMPY, WORLDS

INFO = StepInfo(step=0, rank=0, size=1, divisor=1)
OTHERS = [w for w in WORLDS if w.name in ("numpy-plain", "torch-device", "tensorflow")]


def tie(size: int) -> np.ndarray:
    """Returns elements whose exact sum is a bit above 1 + 2^-24, halfway between two float32. The float64 sum is that, or halfway exactly:
    the small elements count only if they are added to one another before the large ones."""
    return np.array([1.0, 2.0**-24] + [0.45 * 2.0**-52] * (size - 2), np.float32)


def orders(size: int):
    """Yields all orders of a few elements, some of many."""
    if size <= 5:
        yield from itertools.permutations(range(size))
    else:
        yield from (np.random.default_rng(i).permutation(size) for i in range(24))


def in_order(x: np.ndarray) -> float:
    """Returns the sum in the order of arrays/sums.py, one by one."""
    total = 0.0
    for start in range(0, len(x), PIECE):
        piece = [float(v) for v in x[start : start + PIECE]]
        piece += [0.0] * (min(len(x), PIECE) - len(piece))
        while (left := len(piece)) > 1:
            half = left // 2
            piece = [piece[j] + piece[left - half + j] if j < half else piece[j] for j in range(left - half)]
        total += piece[0]
    return total


def payload(world, text: str, x: np.ndarray, fused: bool = False) -> list[bytes]:
    """Returns what the compressor sends of x; with `fused`, by the pass that also adds a residual of zeros."""
    part, spec, ops = grace_ext.grace(f"{text} + none").compressor, TensorSpec("w", x.shape), world.ops
    state = part.init(ops, spec, INFO)
    if fused:
        found = part.fused(ops, x.copy(), Feedback(np.zeros_like(x)), spec, INFO, state)
        sent = found.payload if found else part.compress(ops, x, spec, INFO, state)[0]
    else:
        sent, _ = part.compress(ops, ops.ingest(world.tensor(x)), spec, INFO, state)
    return [np.array(ops.host(piece)).tobytes() for piece in sent]


#: Every compressor that sends a sum, a mean or a norm, or decides by one; {} is the size.
SUMMING = (
    "efsignsgd", "efsignsgd(block={})", "onebit", "onebit(block={})", "adaq(ratio=1)", "wangni(ratio=0.5)", "sidco(ratio=0.2)",
    "sidco(ratio=0.1, distribution='pareto')", "qsgd(bits=2)", "qsgd(bits=4, bucket={})", "terngrad(clip=2.5)", "vqsgd(repeats=3)",
    "vqsgd(repeats=3, hull='l1')", "sketch(quantiles=2)", "dqsgd", "adaqs",
)  # fmt: skip


@pytest.mark.parametrize("size", [3, 4, 5, 8, 100])
@pytest.mark.parametrize("text", SUMMING)
def test_payloads_at_ties(text, size):
    """However the elements are ordered, the payload is the same in every library and by the fused pass. Two such blocks follow one another,
    and one that is cut short."""
    text = text.format(size)
    for order in orders(size):
        for signs in (1, -1) if "onebit" in text or "adaq" in text else (1,):
            x = signs * np.concatenate([tie(size)[list(order)], tie(size), tie(size)[: size // 2]]).astype(np.float32)
            wanted = payload(NUMPY, text, x)
            assert all(payload(world, text, x) == wanted for world in OTHERS), order
            if NUMPY.ops.kernels:
                assert payload(NUMPY, text, x, fused=True) == wanted, order


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 31, 33, 100, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_the_order(world, size):
    """Norms and totals are the sums in the order that arrays/sums.py describes, whatever the processor's vectors are."""
    x = (np.random.default_rng(size).standard_t(2, size)).astype(np.float32)
    ops = world.ops
    given = ops.upload(x)
    assert ops.total(given) == in_order(x)
    assert ops.block_norms(given, size, 1)[0] == in_order(np.abs(x))
    assert ops.block_norms(given, size, 2)[0] == math.sqrt(in_order(np.square(x.astype(np.float64))))
    assert ops.total(ops.upload(x.astype(np.float64))) == in_order(x)


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("block", [1, 4, 7, 16, 100, PIECE, PIECE + 3])
def test_the_order_in_blocks(world, block):
    """A last block that is cut short is filled up with zeros, which decides the order."""
    x = np.random.default_rng(block).standard_t(2, 2 * block + block // 2 + 1).astype(np.float32)
    filled = np.concatenate([x, np.zeros(-len(x) % block, np.float32)]).reshape(-1, block)
    found = world.ops.block_norms(world.ops.upload(x), block, 1)
    assert found.tolist() == [in_order(np.abs(row)) for row in filled]
    assert world.ops.block_norms(world.ops.upload(x), block, np.inf).tolist() == np.abs(filled).max(axis=1).tolist()


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
def test_nothing_to_add(world):
    nothing = world.ops.zeros(0)
    assert world.ops.total(nothing) == 0 and len(world.ops.block_norms(nothing, 4, 2)) == 0 and world.ops.norm(nothing) == 0
