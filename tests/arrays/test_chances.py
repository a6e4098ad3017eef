"""Chances are exact, however small: of positions drawn together, and of rounding up.

Draws are a function of keys, so each test always passes or always fails; the limits are as unlikely as six standard deviations.
"""

from __future__ import annotations

import math
from itertools import combinations
from unittest import mock

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import kernels, sampling
from grace_ext.arrays.kernels.sizes import FEW
from grace_ext.parts import rng
from grace_ext.parts.ops import Feedback
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import NUMPY, WORLDS

INFO = StepInfo(step=0, rank=0, size=1, divisor=1)
by_world = pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
compiled = pytest.mark.skipif(not kernels.enabled(), reason="GRACE_EXT_KERNELS=0, or no numba")


def positions(d: int, k: int, draws: int) -> np.ndarray:
    """Returns int64[draws, k]: what `sample` gives for so many keys."""
    keys = rng.words((d, k), 2 * draws).reshape(-1, 2)
    if kernels.enabled():
        found = sampling.sample_each([tuple(map(int, key)) for key in keys], [d] * draws, [k] * draws).reshape(draws, k)
        return found - d * np.arange(draws)[:, None]
    return np.array([np.sort(sampling._permuted(tuple(map(int, key)), d, k)) for key in keys])


def excess(counts: np.ndarray, expected: float) -> float:
    """Returns by how many standard deviations chi-square is above its mean."""
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("d", [3, 4, 5, 7, 10, 16, 17, 32, 64, 65, FEW, FEW + 1])
def test_pairs_of_positions_are_equally_likely(d):
    """Every pair of positions, of d choose 2, is drawn equally often (chi-square)."""
    draws = 200_000
    pairs = positions(d, 2, draws)
    counts = np.bincount(pairs[:, 0] * d + pairs[:, 1], minlength=d * d).reshape(d, d)[np.triu_indices(d, 1)]
    assert counts.sum() == draws
    assert abs(excess(counts, draws / len(counts))) < 6


@pytest.mark.parametrize(("d", "k"), [(5, 3), (6, 3), (8, 4), (10, 9), (12, 3)])
def test_sets_of_positions_are_equally_likely(d, k):
    draws = 100_000
    sets = list(combinations(range(d), k))
    places = {one: place for place, one in enumerate(sets)}
    counts = np.bincount([places[tuple(one)] for one in positions(d, k, draws).tolist()], minlength=len(sets))
    assert abs(excess(counts, draws / len(sets))) < 6


@compiled
@pytest.mark.parametrize("d", [1, 2, 3, 16, 64, FEW - 1, FEW, FEW + 1, 1000])
def test_positions_with_and_without_kernels(d):
    for k in {1, min(2, d), d // 2 or 1, max(1, d - 1)}:
        key = (d, k)
        with mock.patch.object(kernels, "enabled", lambda: False):
            plain = np.sort(sampling._permuted(key, d, k))
        assert np.array_equal(np.sort(sampling._permuted(key, d, k)), plain)
        assert np.array_equal(sampling.sample_each([key], [d], [k]), plain)


# --- rounding ------------------------------------------------------------------------------------------------------------


def undecided(key, size: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (positions; their chances; what is left of these): chances that lie between the draw at that position and the next one, so
    that the draw alone does not decide. `left` is the chance that it goes up, in units of the draws' 2^-24."""
    draws = (rng.words(key, size) >> np.uint32(8)).astype(np.int64)
    at = np.flatnonzero(draws < 2**11)
    left = np.resize(np.array([1 / 2, 1 / 4, 1 / 8, 1 / 256, 5 / 8, 0.9375]), len(at))
    chances = ((draws[at] + left) / 2.0**24).astype(dtype)
    assert (chances * 2.0**24 == draws[at] + left).all()  # exact
    return at, chances, left


def deviation(up: np.ndarray, left: np.ndarray) -> float:
    """Returns by how many standard deviations more went up than expected."""
    return float((up.sum() - left.sum()) / math.sqrt((left * (1 - left)).sum()))


KEY, SIZE = (123, 456), 1 << 22


@by_world
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draws_that_tie_with_the_chance(world, dtype):
    """They hold with what is left of the chance, not always: 2^-26 is the chance of a quarter of a draw."""
    at, chances, left = undecided(KEY, SIZE, dtype)
    given = np.zeros(SIZE, dtype)
    given[at] = chances
    up = np.array(world.ops.host(world.ops.drawn(world.ops.upload(given), KEY)))
    assert not np.delete(up, at).any() and len(at) > 400
    for share in np.unique(left):
        assert abs(deviation(up[at][left == share], left[left == share])) < 6
    assert np.array_equal(up, NUMPY.ops.drawn(given, KEY))


@by_world
def test_chances_that_nobody_waits_for(world):
    """Operations that defer settle the few ties there may be where they are; with one, with some, with none, and at the first place."""
    at, chances, _ = undecided(KEY, SIZE)
    for kept in (slice(0, 1), slice(3, 40), slice(0, 0)):
        given = np.zeros(SIZE, np.float32)
        given[0], given[at[kept]] = 1, chances[kept]
        up = world.ops.host(world.ops.deferring().drawn(world.ops.upload(given), KEY))
        assert np.array_equal(np.array(up), NUMPY.ops.drawn(given, KEY))


@by_world
def test_rounding_that_ties(world):
    """round_randomly rounds up with the exact chance; the kernel gives the same codes."""
    at, chances, left = undecided(KEY, SIZE)
    x = np.zeros(SIZE, np.float32)
    x[at] = -chances
    codes = np.array(world.ops.host(world.ops.round_randomly(world.ops.upload(x), world.ops.upload(np.ones(1, np.float32)), 7, KEY)))
    assert abs(deviation(codes[at], left)) < 6 and not np.delete(codes, at).any()
    if world.ops.kernels:
        found = np.empty(SIZE, np.int32)
        world.ops.kernels.round_randomly(x, np.float32(1), np.int32(7), np.int32(8), *map(np.uint32, KEY), found)
        assert np.array_equal(found & 7, codes) and ((found >= 8) == (x < 0)).all()


@by_world
@pytest.mark.parametrize("text", ["terngrad", "scaled_int(width=8, rounding='stochastic')"])
def test_compressors_round_up_with_exact_chances(world, text):
    """Elements of which a draw alone does not decide are sent with the rest of their chance; the largest element makes the scale 1."""
    part, spec = grace_ext.grace(f"{text} + none").compressor, TensorSpec("w", (SIZE,))
    key = INFO.private_key("w", part.name)
    at, chances, left = undecided(key, SIZE)
    x, largest = np.zeros(SIZE, np.float32), 1.0 if part.name == "terngrad" else 127.0
    x[at] = chances
    x[np.flatnonzero(x == 0)[0]] = largest
    payload, _ = part.compress(world.ops, world.ops.upload(x), spec, INFO, {})
    out = np.array(world.ops.host(part.decompress(world.ops, payload, spec, INFO)))
    assert abs(deviation(out[at], left)) < 6 and out.sum() == out[at].sum() + largest
    if world.ops.kernels and part.name == "terngrad":
        fused = part.fused(world.ops, x, Feedback(np.zeros_like(x)), spec, INFO, {})
        assert all(np.array_equal(a, b) for a, b in zip(fused.payload, payload, strict=True))


def test_further_words_decide_bit_by_bit():
    """A tied word leaves the decision to the next; the chance is compared with all of their bits."""
    at = np.arange(1000)
    first, second = (rng.words((7, 9 ^ turn * rng.SETTLING & 0xFFFFFFFF), 1000).astype(np.float64) for turn in (1, 2))
    share = at % 97 / 2.0**7  # of one first word; so few bits that all sums are exact
    for chances, wanted in (
        (first / 2.0**32, np.zeros(1000, bool)),
        ((first + 1) / 2.0**32, np.ones(1000, bool)),
        ((first + share) / 2.0**32, second < share * 2.0**32),
    ):
        assert np.array_equal(rng.settled((7, 9), at, chances), wanted)


@compiled
def test_further_words_with_and_without_kernels():
    at = np.arange(0, 40_000)
    chances = np.resize([0.5, 2.0**-31, 1 / 3, 1e-9, 2.0**-33, 0.0, 1 - 2.0**-53], len(at))
    found = [kernels.load().settled(chance, np.uint32(j), np.uint32(7), np.uint32(9)) for j, chance in zip(at, chances, strict=True)]
    assert np.array_equal(found, rng.settled((7, 9), at, chances))
