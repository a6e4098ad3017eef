"""L-GreCo's error tables against float64 and full decompositions."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.policies.losses import held_back, losses
from grace_ext.spec import TensorSpec
from grace_ext.testing.worlds import NUMPY

OPS = NUMPY.ops


def table(text: str, x: np.ndarray):
    """(values of the knob, errors) of lgreco with this base."""
    policy = grace_ext.grace(f"lgreco(base={text})").policy
    spec = TensorSpec("w", x.shape)
    return policy, losses(OPS, x.reshape(-1), spec, list(policy.leaves), policy._knob[0])


def sample(shape, seed=0):
    """Heavy tails and a decaying spectrum."""
    generator = np.random.default_rng(seed)
    a, b = shape[0], int(np.prod(shape[1:]))
    low = generator.standard_normal((a, min(a, b))) * 0.8 ** np.arange(min(a, b)) @ generator.standard_normal((min(a, b), b))
    return (low * np.exp(generator.standard_normal((a, b)))).astype(np.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(50, 40), (7,), (3, 3, 3, 3)])
def test_top_k(shape):
    """The norm of what is not among the k largest."""
    x = sample(shape if len(shape) > 1 else (*shape, 1)).reshape(shape)
    policy, found = table("topk(ratio=0.01) + residual", x)
    flat = np.sort(np.abs(x.reshape(-1).astype(np.float64)))[::-1]
    for value, leaf, error in zip(policy.values, policy.leaves, found, strict=True):
        k = max(1, min(x.size, int(np.ceil(value * x.size - 1e-9))))
        dense = leaf.parts_for(TensorSpec("w", shape))[0].name == "none"
        expected = 0.0 if dense else float(np.linalg.norm(flat[k:]))
        assert error == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("shape", [(60, 400), (400, 60), (64, 16, 3, 3), (6, 90), (130, 170)])
def test_rank(shape):
    """The singular values beyond the rank: never less than the best possible error, and at most 2% more."""
    x = sample(shape)
    policy, found = table("powersgd(rank=4) + residual", x)
    values = np.linalg.svd(x.reshape(shape[0], -1).astype(np.float64), compute_uv=False)
    for rank, leaf, error in zip(policy.values, policy.leaves, found, strict=True):
        dense = leaf.parts_for(TensorSpec("w", shape))[0].name == "none"
        best = 0.0 if dense else float(np.linalg.norm(values[rank:]))
        assert best * (1 - 1e-5) - 1e-4 * values[0] <= error <= best * 1.02 + 1e-4 * values[0], rank


def test_a_matrix_smaller_than_the_highest_rank():
    """The authors' code fails there."""
    policy, found = table("powersgd(rank=4) + residual", sample((3, 5)))
    assert np.isfinite(found).all() and found[-1] == 0


@pytest.mark.parametrize("shape", [(40, 30), (512,)])
def test_rank_of_zeros_and_of_vectors(shape):
    policy, found = table("powersgd(rank=4) + residual", np.zeros(shape, np.float32))
    assert found == [0.0] * len(policy.leaves)


def test_bits_by_quantizing():
    """qsgd's error: the fewer bits the more, and within twice its expectation sum over blocks of ||x|| sqrt(d) / (2 s)."""
    x = sample((64, 64))
    policy, found = table("qsgd(bits=4)", x)
    assert policy.values == (2, 3, 4, 5, 6, 7, 8) and found == sorted(found, reverse=True)
    blocks = x.reshape(-1, 512).astype(np.float64)
    for bits, error in zip(policy.values, found, strict=True):
        scale = np.linalg.norm(blocks, axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        fraction = np.abs(blocks) / scale % 1
        assert error == pytest.approx(float(np.sqrt((scale**2 * fraction * (1 - fraction)).sum())), rel=0.15)


def test_what_feedback_holds_back():
    """Against the recursion itself: of x and what is left of before, a part is not sent, again and again."""
    x = sample((40, 30)).reshape(-1)
    norm = float(np.linalg.norm(x.astype(np.float64)))
    for part in (0.0, 0.1, 0.5, 0.9, 0.99):
        residual = np.zeros(x.size)
        for _ in range(4000):
            residual = part * (x.astype(np.float64) + residual)
        assert held_back([part * norm], x) == [pytest.approx(float(np.linalg.norm(residual)), rel=1e-9)]


def test_what_feedback_holds_back_at_the_edges():
    """What loses nothing holds nothing, of a zero gradient, too; what loses all, or more, holds ever more. One of 10,000,000 equal elements
    is sent: that is no more than the float64 of what is lost can tell."""
    x = np.ones(4, np.float32)
    assert held_back([0.0, 1.0, 2.0, 3.0], x) == [0.0, 2.0, math.inf, math.inf]
    assert held_back([0.0], np.zeros(4, np.float32)) == [0.0]
    many = np.ones(10_000_000, np.float32)
    assert held_back([math.sqrt(many.size - 1)], many)[0] == pytest.approx(2 * many.size**1.5, rel=1e-3)
