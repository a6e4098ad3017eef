"""Compares compressors that combine several ideas (wangni, atomo, demo, induced) with their equations in float64."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import sampling
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts import rng
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY

from . import oracles
from .test_oracles import MATRIX, RUNS, VECTOR, compare
from .test_oracles_sparse import Stepwise, count, info, largest, only


def gaussian(size, step, shape):
    return [inputs.normal(rank, step, shapes={"w": shape})["w"] for rank in range(size)]


def chances(sizes: np.ndarray, budget: float) -> np.ndarray:
    """Returns p_j = min(1, c size_j) with sum `budget`; finds c by bisection."""
    if not sizes.any() or np.count_nonzero(sizes) <= budget:
        return (sizes > 0).astype(float)
    low, high = 0.0, budget / sizes[sizes > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * sizes).sum() < budget else (low, middle)
    return np.minimum(1, high * sizes)


def drawn(key, p: np.ndarray) -> np.ndarray:
    return (rng.words(key, p.size) + 0.5) / 2**32 < p


def wangni(ratio):
    def one(x, rank, step):
        p = chances(abs(x), count(ratio, x.size))
        chosen = drawn(info(step, rank).private_key("w", "wangni"), p)
        return np.where(chosen, x / np.where(p > 0, p, 1), 0)

    return Stepwise(one)


@RUNS
@pytest.mark.parametrize("ratio", [0.05, 0.6, 1])
def test_wangni(world, ratio, size):
    """wangni has the least variance for k elements: it sends large ones as they are, and others at random, unbiased."""
    wide = lambda n, step, shape: [x**3 for x in gaussian(n, step, shape)]  # noqa: E731
    compare(world, grace_ext.grace(f"wangni(ratio={ratio}) + none"), wangni(ratio), size, VECTOR, relative=2e-6, gradients=wide)


def matrix(x):
    return x.reshape(x.shape[0], -1)


def atomo(rank):
    def oracle(p):
        oracle.step += 1
        sent = []
        for worker, x in enumerate(p):
            u, s, v = np.linalg.svd(matrix(x), full_matrices=False)
            chance = chances(s, rank)
            keep = drawn(info(oracle.step, worker).private_key("w", "atomo"), chance)
            sent.append(sum((s[i] / chance[i] * np.outer(u[:, i], v[i]) for i in np.flatnonzero(keep)), 0 * matrix(x)).reshape(x.shape))
        return oracles.mean(sent), sent

    oracle.step = -1
    return oracle


@RUNS
@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("shape", [MATRIX, (4, 3, 5, 5)])
def test_atomo(world, shape, rank, size):
    """atomo sends singular triplets by their probabilities, or all of them if `rank` is at least the matrix's; vectors are averaged."""
    g = grace_ext.grace(f"atomo(rank={rank}) + none")
    compare(world, g, atomo(rank), size, shape, relative=2e-6 * math.prod(shape), gradients=gaussian)
    compare(world, g, oracles.averaged(lambda x: x), size, VECTOR, relative=1e-6)


def side(n: int, chunk: int) -> int:
    """Returns the tile length: n, a divisor of at least chunk / 2, or the smallest length that needs no more tiles than `chunk`."""
    divisors = [h for h in range(1, chunk + 1) if n % h == 0]
    return n if n <= chunk else divisors[-1] if divisors[-1] >= chunk / 2 else math.ceil(n / math.ceil(n / chunk))


def cosine(n):
    return np.array([[math.sqrt((1 if i == 0 else 2) / n) * math.cos(math.pi * (j + 0.5) * i / n) for j in range(n)] for i in range(n)])


def demo(shape, chunk, topk, values=lambda x: x, sign=False):
    """Returns DeMo, computed tile by tile in plain loops."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
    h, w = side(rows, chunk), side(columns, chunk)
    down, across = cosine(h), cosine(w)
    corners = [(i, j) for i in range(0, rows, h) for j in range(0, columns, w)]

    def coefficients(x):
        padded = np.zeros((rows + h, columns + w))
        padded[:rows, :columns] = x.reshape(rows, columns)
        return [down @ padded[i : i + h, j : j + w] @ across.T for i, j in corners]

    def image(tiles):
        padded = np.zeros((rows + h, columns + w))
        for (i, j), tile in zip(corners, tiles, strict=True):
            padded[i : i + h, j : j + w] = down.T @ tile @ across
        return padded[:rows, :columns].reshape(shape)

    def oracle(p):
        few = min(topk, h * w)
        picked = [[values(only(t.ravel(), largest(t.ravel(), few))).reshape(h, w) for t in coefficients(x)] for x in p]
        senders = [sum((tiles[i] != 0).astype(int) for tiles in picked) for i in range(len(corners))]
        result = image([sum(tiles[i] for tiles in picked) / np.maximum(senders[i], 1) for i in range(len(corners))])
        return np.sign(result) if sign else result, [image(tiles) for tiles in picked]

    return oracle


DEMO = [((24, 18), 64, 32), ((24, 18), 6, 5), ((67, 3), 64, 32), ((193,), 64, 7), ((4, 3, 5, 5), 4, 3), ((30, 40), 8, 64)]


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual(beta=0.999)"])
@pytest.mark.parametrize("shape,chunk,topk", DEMO)
def test_demo(world, shape, chunk, topk, memory, size):
    """demo sends the largest coefficients of each tile and averages each over its senders only. Shapes: divisors, primes with padding,
    vectors and kernels. With residual(beta=0.999), delta <- 0.999 delta + g - (sent part), which is DeMo's momentum."""
    g = grace_ext.grace(f"demo(chunk={chunk}, topk={topk}, values='fp32') + {memory}")
    compare(world, g, demo(shape, chunk, topk), size, shape, relative=2e-6, gradients=gaussian)


def test_demo_signs_and_rounding(world):
    """sign=True returns signs; the rounding error of a 16-bit coefficient stays in the residual; a sum is n times the mean."""
    g = grace_ext.grace("demo(chunk=8, topk=5, values='fp32', sign=True) + residual(beta=0.999)")
    compare(world, g, demo(MATRIX, 8, 5, sign=True), 2, MATRIX, relative=2e-6, gradients=gaussian)
    rounded = demo(MATRIX, 8, 5, lambda x: x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float))
    compare(world, grace_ext.grace("demo(chunk=8, topk=5) + residual"), rounded, 1, MATRIX, relative=2e-6, gradients=gaussian)
    one, summed = (world.cluster(grace_ext.grace("demo(topk=4) + none"), 2) for _ in range(2))
    for driver in summed.drivers:
        driver.divisor = 1
    given = [{"w": x} for x in gaussian(2, 0, MATRIX)]
    assert np.array_equal(2 * world.step(one, given)["w"], world.step(summed, given)["w"])


def test_a_result_that_is_not_a_mean_is_not_compressed_again():
    """reduce_scatter rejects demo(sign=True), because it would send the signs of shards through the transform again."""
    with pytest.raises(IncompatiblePartsError, match="not a mean"):
        grace_ext.grace("demo(sign=True) + residual @ reduce_scatter")
    for text in ("demo", "none", "signsgd"):
        grace_ext.grace(f"{text} + residual @ reduce_scatter")


def induced(ratio, second):
    def one(x, rank, step):
        first = only(x, largest(x, count(ratio, x.size)))
        rest = x - first
        positions = sampling.sample(info(step, rank).shared_key("w (rest)", "randomk"), x.size, count(second, x.size))
        return first + only(rest, positions) * (x.size / len(positions))

    return Stepwise(one)


@RUNS
def test_induced(world, size):
    """induced sends the top k, and an unbiased random selection of the rest."""
    g = grace_ext.grace("induced(biased=topk(ratio=0.1), rest=randomk(ratio=0.2, scale=True)) + none")
    compare(world, g, induced(0.1, 0.2), size, VECTOR, relative=1e-5)


def test_induced_draws_its_two_parts_independently():
    """Two randomk parts draw different positions: with the same positions the rest would always be zero there, and the sum biased."""
    g = grace_ext.grace("induced(biased=randomk(ratio=0.25), rest=randomk(ratio=0.25, scale=True)) + none")
    out = NUMPY.step(NUMPY.cluster(g, 1), [{"w": np.ones(64, np.float32)}])["w"]
    assert 20 < np.count_nonzero(out) < 32 and set(np.unique(out)) == {0, 1, 4}


@pytest.mark.parametrize(
    "text,match",
    [
        ("biased=qsgd", "contraction"),
        ("biased=threshold", "contraction"),
        ("biased=topk(values='fp16')", "contraction"),
        ("rest=randomk(ratio=0.1)", "unbiased"),
        ("rest=topk", "unbiased"),
        ("biased=signsgd", "signsgd"),
        ("biased=powersgd", "powersgd"),
        ("biased=sidco", "sidco"),
        ("biased=global_topk", "global_topk"),
    ],
)
def test_induced_refuses_what_does_not_fit(text, match):
    """`biased` must promise a contraction, `rest` must be unbiased, and neither may have rounds, votes or state."""
    with pytest.raises(IncompatiblePartsError, match=match):
        grace_ext.grace(f"induced({text}) + none")
