"""Compares L-GreCo's error tables with float64 and full singular value decompositions."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.parts.tensor import TensorSpec
from grace_ext.policies.losses import losses, of_adam
from grace_ext.testing.worlds import NUMPY

OPS = NUMPY.ops


def table(text: str, x: np.ndarray):
    """Returns (policy, errors) of lgreco with this base; policy.values has the knob's values."""
    policy = grace_ext.grace(f"lgreco(base={text})").policy
    spec = TensorSpec("w", x.shape)
    return policy, losses(OPS, x.reshape(-1), spec, list(policy.leaves), policy._knob[0])


def sample(shape, seed=0):
    """Returns a gradient with heavy tails and a decaying spectrum."""
    generator = np.random.default_rng(seed)
    a, b = shape[0], int(np.prod(shape[1:]))
    low = generator.standard_normal((a, min(a, b))) * 0.8 ** np.arange(min(a, b)) @ generator.standard_normal((min(a, b), b))
    return (low * np.exp(generator.standard_normal((a, b)))).astype(np.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(50, 40), (7,), (3, 3, 3, 3)])
def test_top_k(shape):
    """The error of topk is the norm of all elements but the k largest."""
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
    """The error of powersgd is at least the best possible (the norm of the singular values beyond the rank) and at most 2% more."""
    x = sample(shape)
    policy, found = table("powersgd(rank=4) + residual", x)
    values = np.linalg.svd(x.reshape(shape[0], -1).astype(np.float64), compute_uv=False)
    for rank, leaf, error in zip(policy.values, policy.leaves, found, strict=True):
        dense = leaf.parts_for(TensorSpec("w", shape))[0].name == "none"
        best = 0.0 if dense else float(np.linalg.norm(values[rank:]))
        assert best * (1 - 1e-5) - 1e-4 * values[0] <= error <= best * 1.02 + 1e-4 * values[0], rank


def test_a_matrix_smaller_than_the_highest_rank():
    """A matrix may be smaller than the highest rank; the authors' code fails on it."""
    policy, found = table("powersgd(rank=4) + residual", sample((3, 5)))
    assert np.isfinite(found).all() and found[-1] == 0


@pytest.mark.parametrize("shape", [(40, 30), (512,)])
def test_rank_of_zeros_and_of_vectors(shape):
    policy, found = table("powersgd(rank=4) + residual", np.zeros(shape, np.float32))
    assert found == [0.0] * len(policy.leaves)


def test_bits_by_quantizing():
    """The error of qsgd grows with fewer bits and is within 15% of its expectation."""
    x = sample((64, 64))
    policy, found = table("qsgd(bits=4)", x)
    assert policy.values == (2, 3, 4, 5, 6, 7, 8) and found == sorted(found, reverse=True)
    blocks = x.reshape(-1, 512).astype(np.float64)
    for bits, error in zip(policy.values, found, strict=True):
        scale = np.linalg.norm(blocks, axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        fraction = np.abs(blocks) / scale % 1
        assert error == pytest.approx(float(np.sqrt((scale**2 * fraction * (1 - fraction)).sum())), rel=0.15)


@pytest.mark.parametrize("shape", [(40, 30), (17, 90)])
def test_what_adam_loses(shape):
    """Adam's loss: a step of length sqrt(d) along x descends by sqrt(d) ||x||, along the sent part c by sqrt(d) <x, c> / ||c||."""
    x = sample(shape).astype(np.float64)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    sent = [(left[:, :r] * values[:r]) @ right[:r] for r in (1, 3, 9)]
    sent += [np.where(np.abs(x) >= np.sort(np.abs(x), axis=None)[-k], x, 0) for k in (1, 20, 600)]
    expected = [math.sqrt(x.size) * (np.linalg.norm(x) - np.vdot(x, c) / np.linalg.norm(c)) for c in sent]
    found = of_adam([float(np.linalg.norm(x - c)) for c in sent], x.reshape(-1))
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_adam_loses_at_the_edges():
    """The loss is 0 if x is zero or sent whole, all if nothing is sent, and more if the sent part is worse than nothing. For a small
    error it is about half its square."""
    x = np.ones(4, np.float32)
    assert of_adam([0.0, 2.0], x) == [0.0, 4.0] and of_adam([3.0], x)[0] > 4.0
    assert of_adam([0.0], np.zeros(4, np.float32)) == [0.0]
    assert of_adam([1e-9], x) == [pytest.approx(2 * 1e-18 / 4, rel=1e-6)]
