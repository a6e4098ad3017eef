"""Unbiased compressors that select at random: the mean over draws is the input, and the variance is as declared.

Draws are a function of (seed, name, step, rank), so each test always passes or always fails; limits are 5 standard deviations of a mean.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import grace_ext
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY

from ..oracles.test_oracles_mixed import chances

DRAWS = 400


def decoded(text: str, x: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Returns C(x) at each of `draws` steps, as float64[draws, d]."""
    part, spec, out = grace_ext.grace(f"{text} + none").compressor, TensorSpec("w", x.shape), []
    for step in range(draws):
        info = StepInfo(step=step, rank=0, size=1, divisor=1)
        payload, _ = part.compress(NUMPY.ops, x.reshape(-1), spec, info, {})
        out.append(part.decompress(NUMPY.ops, payload, spec, info).astype(np.float64))
    return np.array(out)


def gaussian(*shape):
    return inputs.normal(0, 1, shapes={"w": shape})["w"]


UNBIASED = {
    "wangni(ratio=0.1)": (64,),
    "wangni(ratio=0.5)": (64,),
    "atomo(rank=1)": (8, 8),
    "atomo(rank=3)": (4, 16),
    "randblock(ratio=0.25, scale=True)": (64,),
    "induced": (64,),
    "induced(biased=topk(ratio=0.1), rest=qsgd(bits=2))": (64,),
    "induced(biased=randomk(ratio=0.25), rest=randomk(ratio=0.25, scale=True))": (64,),
    "induced(biased=dgc(ratio=0.1), rest=wangni(ratio=0.2))": (64,),
}


@pytest.mark.parametrize("text", UNBIASED)
def test_unbiased(text):
    """The means of every element and of the projection on x are within 5 standard deviations; the squared error is within omega's bound."""
    x = gaussian(*UNBIASED[text])
    x += 0.3 * np.sign(x)  # so that no element is too small to be drawn
    draws = 3000 if text == "induced" else DRAWS  # it draws one element of 64 at a time
    out, flat = decoded(text, x, draws), x.reshape(-1).astype(np.float64)
    part = grace_ext.grace(f"{text} + none").compressor
    assert part.unbiased
    deviation = out.std(axis=0) / np.sqrt(draws) + 1e-6 * np.abs(flat)
    assert (np.abs(out.mean(axis=0) - flat) <= 5 * deviation + 1e-6).all()
    along = (out - flat) @ flat
    assert abs(along.mean()) <= 5 * along.std() / np.sqrt(draws) + 1e-5
    errors = ((out - flat) ** 2).sum(axis=1)
    assert errors.mean() - 5 * errors.std() / np.sqrt(draws) <= part.omega(64) * (flat**2).sum()


def test_wangni_has_the_least_variance_and_the_expected_size():
    """The variance is sum of x^2 (1 / p - 1) with p of sum k; k elements are sent on average, or fewer if fewer are not zero."""
    x = gaussian(64) ** 3
    out, p = decoded("wangni(ratio=0.25)", x, 1000), chances(abs(x.astype(float)), 16)
    wanted = (x.astype(float) ** 2 * (1 / p - 1)).sum()
    errors = ((out - x) ** 2).sum(axis=1)
    assert abs(errors.mean() - wanted) <= 5 * errors.std() / 1000**0.5
    sizes = np.count_nonzero(out, axis=1)
    assert abs(sizes.mean() - 16) <= 5 * sizes.std() / 1000**0.5 and sizes.std() > 1
    x[3:] = 0
    assert (np.count_nonzero(decoded("wangni(ratio=0.25)", x, 20), axis=1) == 3).all()
    assert not decoded("wangni", np.zeros(64, np.float32), 3).any()


def test_wangni_of_many_sizes():
    """Results are finite and keep signs if each pass finds more large elements, and for tiny, huge and very different magnitudes."""
    for x in (1.5 ** np.arange(64), 1.4e-45 * np.arange(64), 3e38 * np.ones(64), np.where(np.arange(64) % 2, 1e-30, -1e30)):
        x = x.astype(np.float32)
        out = decoded("wangni(ratio=0.5)", x, 50)
        assert np.isfinite(out).all() and (out * x >= 0).all() and out.any()


def test_atomo_sends_rank_triplets_on_average():
    """The number of triplets varies around the rank (not so in the published code, which is biased); a low-rank matrix is sent whole."""
    x = gaussian(12, 9)
    part, spec = grace_ext.grace("atomo(rank=2) + none").compressor, TensorSpec("w", x.shape)
    sizes = []
    for step in range(DRAWS):
        payload, _ = part.compress(NUMPY.ops, x.reshape(-1), spec, StepInfo(step=step, rank=0, size=1, divisor=1), {})
        sizes.append(len(payload[0]) / 4 / 12)
    assert set(sizes) >= {1, 2, 3} and abs(np.mean(sizes) - 2) <= 5 * np.std(sizes) / DRAWS**0.5
    low = (gaussian(12)[:, None] * gaussian(9)[None]).astype(np.float32)
    assert np.allclose(decoded("atomo(rank=1)", low, 5), low.reshape(-1), atol=1e-5)
    assert np.allclose(decoded("atomo(rank=20)", x, 3), x.reshape(-1), atol=1e-5)


@pytest.mark.parametrize("text", ["wangni(ratio=0.3)", "atomo(rank=3)"])
def test_draws_are_private_to_rank_name_and_step(text):
    """The same gradient is sampled differently by every rank, under every name, seed and at every step."""
    x, seen = gaussian(40, 30), set()
    part = grace_ext.grace(f"{text} + none").compressor
    for name, step, rank, seed in itertools.product(("ab", "ba"), (0, 1), (0, 1), (0, 1)):
        info = StepInfo(step=step, rank=rank, size=2, divisor=2, seed=seed)
        payload, _ = part.compress(NUMPY.ops, x.reshape(-1), TensorSpec(name, x.shape), info, {})
        seen.add(b"".join(piece.tobytes() for piece in payload))
    assert len(seen) == 16


CONTRACTIONS = ["dgc(ratio=0.1)", "adaq(ratio=0.1)", "demo(topk=8, values='fp32')", "topk(ratio=0.1)", "randblock(ratio=0.1)"]


@pytest.mark.parametrize("text", CONTRACTIONS)
def test_contractions_contract(text):
    """||C(x) - x||^2 <= (1 - delta) ||x||^2 for every input, up to float32 rounding; for randblock, in expectation."""
    part = grace_ext.grace(f"{text} + none").compressor
    for d in (1, 7, 600):
        for x in [*inputs.adversarial(d).values(), gaussian(d)]:
            if np.abs(x).max() > 1e30 or (x**2).sum() < 1e-30:
                continue
            flat = x.astype(np.float64)
            errors = ((decoded(text, x, 300 if "rand" in text else 1) - flat) ** 2).sum(axis=1)
            slack = 1e-6 + 5 * errors.std() / errors.size**0.5 / (flat**2).sum()
            assert errors.mean() <= (1 - part.delta(d) + slack) * (flat**2).sum(), d
