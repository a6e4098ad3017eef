"""Random draws have the right probabilities, are private or shared as intended, and use no global generator.

Draws are a function of (seed, name, step, rank), so each test here always passes or always fails. The limits are set as if the draws were
new: the stated false-alarm rate is the probability that a correct generator would exceed them.
"""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import sampling
from grace_ext.parts import rng
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS

from .. import catalog
from .test_worlds import OWN

FALSE_ALARM = 1e-9


def decoded(world, compressor, x: np.ndarray, steps: int, name: str = "w") -> np.ndarray:
    """Returns C(x) at each of `steps` steps, as float64[steps, d]."""
    spec, ops, out = TensorSpec(name, x.shape), world.ops, []
    flat = ops.ingest(world.tensor(x))
    for step in range(steps):
        info = StepInfo(step=step, rank=0, size=1, divisor=1)
        payload, _ = compressor.compress(ops, flat, spec, info, {})
        out.append(np.array(ops.host(compressor.decompress(ops, payload, spec, info)), np.float64))
    return np.array(out)


@pytest.mark.parametrize("knobs", ["bits=8", "bits=4", "bits=2, bucket=64", "levels=5, bucket=100", "levels=1000"])
def test_qsgd_is_unbiased(knobs):
    """Every output is one of the two levels around its input; each mean, and the pooled one, is within Hoeffding's bound
    (false alarm 1e-9 each); the variance is at most omega ||x||^2."""
    compressor = grace_ext.grace(f"qsgd({knobs}) + none").compressor
    x, steps = inputs.normal(0, 1, shapes={"w": (256,)})["w"], 1500
    x[::17] = 0
    out = decoded(NUMPY, compressor, x, steps)
    s, bucket = compressor.s, compressor.bucket
    norm = np.repeat([np.linalg.norm(x[i : i + bucket].astype(np.float64)) for i in range(0, 256, bucket)], bucket)[:256]
    gap = norm / s
    levels = out / gap
    assert np.abs(levels - np.rint(levels)).max() < 1e-4 * s**0.5
    assert (np.abs(out - x) <= gap * (1 + 1e-4)).all() and not out[:, x == 0].any()
    deviation = out.mean(axis=0) - x
    assert (np.abs(deviation) <= gap * math.sqrt(math.log(2 * 256 / FALSE_ALARM) / (2 * steps)) + 1e-6).all()
    pooled = (deviation * np.sign(x) / gap).mean()
    assert abs(pooled) <= math.sqrt(math.log(2 / FALSE_ALARM) / (2 * steps * 256)) + 1e-4
    b = min(bucket, 256)
    omega = min(b / s**2, math.sqrt(b) / s)
    assert ((out - x) ** 2).sum(axis=1).mean() <= 1.05 * omega * (norm[0] ** 2 if b == 256 else (x.astype(np.float64) ** 2).sum())


def test_qsgd_levels_of_the_documentation():
    """b bits give s = 2**(b-1) - 1; the default is 8 bits."""
    s = {knobs: grace_ext.grace(f"qsgd{knobs} + none").compressor.s for knobs in ("", "(bits=2)", "(bits=4)", "(bits=8)", "(levels=9)")}
    assert s == {"": 127, "(bits=2)": 1, "(bits=4)": 7, "(bits=8)": 127, "(levels=9)": 9}


def test_qsgd_draws_are_private_to_rank_name_and_step():
    """The same gradient is rounded differently by every rank, under every name and at every step."""
    x, ops = inputs.normal(0, 1, shapes={"w": (512,)})["w"], NUMPY.ops
    compressor = grace_ext.grace("qsgd(bits=2) + none").compressor
    seen = set()
    for name, step, rank, seed in itertools.product(("ab", "ba"), (0, 1), (0, 1), (0, 1)):
        info = StepInfo(step=step, rank=rank, size=2, divisor=2, seed=seed)
        payload, _ = compressor.compress(ops, x, TensorSpec(name, x.shape), info, {})
        seen.add(payload[1].tobytes())
    assert len(seen) == 16


def test_randomk_scaled_is_unbiased():
    """The mean over the steps is x: each element is within a Chernoff-Hoeffding bound (false alarm 1e-9)."""
    x, steps = np.linspace(1, 2, 40, dtype=np.float32), 1000
    out = decoded(NUMPY, grace_ext.grace("randomk(ratio=0.25, scale=True) + none").compressor, x, steps)
    spread = 4 * x * math.sqrt(math.log(2 * 40 / FALSE_ALARM) / (2 * steps))
    assert (np.abs(out.mean(axis=0) - x) <= spread).all()
    assert ((out - x) ** 2).sum(axis=1).mean() <= 1.05 * 3 * (x.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize(("d", "k"), [(2, 1), (3, 2), (5, 2), (7, 3), (17, 1), (50, 5), (64, 63)])
def test_positions_are_distinct_and_equally_likely(d, k):
    """Positions are ascending and drawn without replacement; every position, and every pair, equally often (6 standard deviations each)."""
    steps = 600
    counts, pairs = np.zeros(d), np.zeros((d, d))
    for step in range(steps):
        positions = sampling.sample(StepInfo(step=step, rank=0, size=1, divisor=1).shared_key("w", "randomk"), d, k)
        assert positions.size == k and positions[0] >= 0 and positions[-1] < d and (np.diff(positions) > 0).all()
        counts[positions] += 1
        pairs[np.ix_(positions, positions)] += 1
    chance = k / d
    assert (np.abs(counts - steps * chance) <= 6 * math.sqrt(steps * chance * (1 - chance)) + 1).all()
    if k > 1:
        chance = k * (k - 1) / (d * (d - 1))
        off = pairs[~np.eye(d, dtype=bool)]
        assert (np.abs(off - steps * chance) <= 6 * math.sqrt(steps * chance * (1 - chance)) + 1).all()


@pytest.mark.parametrize("d", [1, 2, 4, 5, 255, 256, 257, 1023, 1025, 65537])
def test_positions_at_the_edges(d):
    """Positions are valid for d around powers of two, and for one, nearly all and all positions."""
    for k in {1, min(2, d), max(1, d // 3), max(1, d - 1), d}:
        positions = sampling.sample((123, 456), d, k)
        assert positions.dtype == np.int64 and len(set(positions.tolist())) == k
        assert (np.sort(positions) == positions).all() and positions[0] >= 0 and positions[-1] < d


def test_positions_differ_by_name_step_and_seed_not_by_rank():
    """Names that are anagrams get different positions (not so in GRACE); shared positions do not depend on rank, world size or `op`."""
    draw = lambda name, **info: tuple(  # noqa: E731
        sampling.sample(StepInfo(**{"step": 0, "rank": 0, "size": 2, "divisor": 2, **info}).shared_key(name, "randomk"), 10_000, 100)
    )
    assert len({draw("ab"), draw("ba"), draw("ab", step=1), draw("ba", step=1), draw("ab", seed=1), draw("ab\0"), draw("a")}) == 7
    assert draw("ab") == draw("ab", rank=1) == draw("ab", size=8, rank=7) == draw("ab", divisor=1)
    overlap = len(set(draw("ab")) & set(draw("ba")))
    assert overlap <= 9  # 1 expected; 10 or more: false alarm 1e-7


def test_words_are_fair_bits():
    """Each of the 32 bits is set half of the time, and neighbouring words are uncorrelated (6 standard deviations)."""
    n = 1 << 16
    for key in ((0, 0), (1, 0), (0, 1), (2**32 - 1, 2**32 - 1), (0x12345678, 0x9ABCDEF0)):
        words = rng.words(key, n)
        bits = (words[:, None] >> np.arange(32, dtype=np.uint32)) & 1
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 6 * 0.5 / math.sqrt(n)
        centred = words / 2**32 - 0.5
        assert abs((centred[1:] * centred[:-1]).mean() * 12) < 6 / math.sqrt(n)
        assert np.array_equal(rng.words(key, 100, start=50), words[50:150])


def test_normals_have_mean_zero_and_variance_one():
    """The normals with which PowerSGD starts have mean 0 and variance 1, within 6 standard deviations."""
    x = rng.normals((3, 4), 100_000).astype(np.float64)
    assert abs(x.mean()) < 6 / math.sqrt(1e5) and abs(x.var() - 1) < 6 * math.sqrt(2 / 1e5)
    assert np.isfinite(x).all() and np.abs(x).max() < 5


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
@pytest.mark.parametrize("world", OWN)
def test_no_global_generator_is_touched(world, spec):
    """Compression does not change the state of any global generator of the user."""

    def fingerprint():
        marks = [random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]]
        frameworks = {w.framework for w in WORLDS}
        if "torch" in frameworks:
            import torch

            marks.append(torch.get_rng_state().numpy().tobytes())
        if "tensorflow" in frameworks:
            import tensorflow as tf

            marks.append(tf.random.get_global_generator().state.numpy().tobytes())
        return marks

    before = fingerprint()
    cluster = world.cluster(grace_ext.grace(spec), 2)
    for step in range(2):
        world.step(cluster, inputs.ranks(2, step))
    assert fingerprint() == before


@pytest.mark.parametrize("spec", ["randomk(ratio=0.1) + none", "qsgd + none", "powersgd(rank=1, warm_start=False) + none"])
def test_a_global_seed_changes_nothing(spec):
    """Reseeding the global generators, as users do, does not make steps repeat."""
    outs = []
    cluster = NUMPY.cluster(grace_ext.grace(spec), 1)
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        outs.append(NUMPY.step(cluster, [{"w": inputs.normal(0, 0, shapes={"w": (24, 50)})["w"]}])["w"].tobytes())
    assert outs[0] != outs[1]


def test_positions_that_are_kept_are_bounded_by_bytes(monkeypatch):
    """However large the arrays are, those of the last step are kept and older ones are dropped; one that is too large is kept alone."""
    monkeypatch.setattr(sampling, "recent", sampling._Recent())
    monkeypatch.setattr(sampling, "RECENT_BYTES", 100_000)
    first = sampling.sample((0, 1), 10_000, 1000)
    assert sampling.sample((0, 1), 10_000, 1000) is first
    for step in range(40):
        latest = sampling.sample((step, 2), 10_000, 1000)
        assert sampling.recent.nbytes <= 100_000
    assert sampling.sample((39, 2), 10_000, 1000) is latest
    assert sampling.sample((0, 1), 10_000, 1000) is not first and np.array_equal(sampling.sample((0, 1), 10_000, 1000), first)
    large = sampling.sample((3, 3), 100_000, 20_000)
    assert sampling.sample((3, 3), 100_000, 20_000) is large and sampling.recent.nbytes < 170_000
    assert sampling.sample((4, 4), 10, 1) is sampling.sample((4, 4), 10, 1) and sampling.recent.nbytes < 1000


def test_positions_do_not_pile_up_from_step_to_step():
    """300 steps of one large tensor hold no more memory than the bound says (arrays kept by number: hundreds of MiB)."""
    compressor, spec = grace_ext.grace("randomk(ratio=0.1) + none").compressor, TensorSpec("w", (1_000_000,))
    x = np.ones(spec.size, np.float32)
    tracemalloc.start()
    try:
        for step in range(150):
            compressor.compress(NUMPY.ops, x, spec, StepInfo(step=step, rank=0, size=1, divisor=1), {})
        assert tracemalloc.get_traced_memory()[0] < sampling.RECENT_BYTES + 2**23
    finally:
        tracemalloc.stop()
