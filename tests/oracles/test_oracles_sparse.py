"""Compares compressors that pick positions (dgc, sidco, adaq, strom, randblock) with their equations in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.parts import rng
from grace_ext.parts.tensor import StepInfo
from grace_ext.testing.worlds import NUMPY, states

from . import oracles
from .test_oracles import RUNS, VECTOR, compare


def count(ratio: float, d: int) -> int:
    return max(1, min(d, math.ceil(ratio * d - 1e-9)))


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the positions of the k largest magnitudes; ties go to the lowest position."""
    return np.array(sorted(sorted(range(x.size), key=lambda j: (-abs(x[j]), j))[:k]), int)


def only(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    out[positions] = x[positions]
    return out


class Stepwise:
    """Computes the mean of one(x, rank, step) over the ranks, and counts the steps."""

    def __init__(self, one):
        self.one, self.step = one, -1

    def __call__(self, p):
        self.step += 1
        sent = [self.one(x.reshape(-1), rank, self.step).reshape(x.shape) for rank, x in enumerate(p)]
        return oracles.mean(sent), sent


def info(step: int, rank: int) -> StepInfo:
    return StepInfo(step=step, rank=rank, size=1, divisor=1)


def dgc(ratio, sample_ratio=0.01, upper=1.3, lower=0.8, resample=True, shared=False, max_iters=10):
    def one(x, rank, step):
        d, k = x.size, count(ratio, x.size)
        s = max(1, d // max(math.ceil(sample_ratio * d), math.ceil(2 / ratio)))
        s = max(v for v in range(1, s + 1) if (v % 32 == 1 if s > 32 else v % 2 == 1))
        key = info(step, rank).shared_key("w", "dgc") if shared else info(step, rank).private_key("w", "dgc")
        sample = sorted(abs(x[int(rng.words(key, 1)[0] / 2**32 * s) :: s]), reverse=True)
        limit = sample[count(ratio, len(sample)) - 1]
        for _ in range(max_iters):
            m = np.count_nonzero((abs(x) >= limit) & (x != 0))
            if limit == 0 or lower * k <= m <= upper * k or (m > upper * k and resample):
                break
            limit = float(np.float32(limit * (lower if m < lower * k else upper)))
        found = np.flatnonzero((abs(x) >= limit) & (x != 0))
        if not lower * k <= found.size <= upper * k:
            found = largest(x, k)
        return only(x, found)

    return Stepwise(one)


DGC = {
    "dgc(ratio=0.1)": lambda: dgc(0.1),
    "dgc(ratio=0.05, sample_ratio=0.5)": lambda: dgc(0.05, 0.5),
    "dgc(ratio=0.1, upper=1, lower=1, resample=False)": lambda: dgc(0.1, upper=1, lower=1, resample=False),
    "dgc(ratio=0.2, upper=1.1, lower=0.95, resample=False, sampling='shared')": lambda: dgc(0.2, 0.01, 1.1, 0.95, False, True),
    "dgc(ratio=0.1, max_iters=0)": lambda: dgc(0.1, max_iters=0),
    "dgc(ratio=0.5, upper=4)": lambda: dgc(0.5, upper=4),
}


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("text", DGC)
def test_dgc(world, text, memory, size):
    """dgc equals its steps (strided sample, threshold, adaptation, the largest of too many) exactly on the grid."""
    compare(world, grace_ext.grace(f"{text} + {memory}"), DGC[text](), size, VECTOR, relative=2.0**-24 if size == 3 else 0, exact=True)


def tail(law: str, x: np.ndarray, r: float, first: bool) -> float:
    u = x.mean()
    if u == 0:
        return 0.0
    if law == "exponential":
        return u * math.log(1 / r)
    if law == "gamma" and first:
        q = math.log(u) - np.log(x).mean()
        s = (3 - q + math.sqrt((q - 3) ** 2 + 24 * q)) / (12 * q)
        value = -u / s * (math.log(r) + math.lgamma(s))
        if value > 0:
            return value
    v = x.var()
    if v <= 1e-12 * u * u:
        return u
    a, c = u / 2 * (u * u / v + 1), (u * u / v - 1) / 2
    return a * (1 - r**c) / c


class Sidco:
    """Is SIDCo on one rank, with its controller of the number of stages."""

    def __init__(self, ratio, law, stages=3, first=0.25, every=5):
        self.ratio, self.law, self.first, self.every = ratio, law, first, every
        self.limit = max(1, math.ceil(math.log(ratio) / math.log(0.5)))
        self.stages, self.shares = min(stages, self.limit), []

    def __call__(self, x):
        k, m = count(self.ratio, x.size), abs(x[x != 0])
        threshold = self.threshold(m, k / m.size) if m.size > k else 0
        sent = np.where(abs(x) >= threshold, x, 0)
        self.shares.append(np.count_nonzero(sent) / k)
        if len(self.shares) == self.every:
            q, self.shares = np.mean(self.shares), []
            self.stages = max(1, min(self.limit, self.stages + (1 if q < 0.8 else -1 if q > 1.2 else 0)))
        return sent

    def threshold(self, m, r):
        more = self.stages - 1
        steps = [r] if not more or r >= self.first else [self.first] + [(r / self.first) ** (1 / more)] * more
        t = 0.0
        for i, step in enumerate(steps):
            rest = m[m >= t]
            t = float(np.float32(min(t + tail(self.law, rest - rest.min() if i else rest, step, i == 0), m.max())))
        return t


SIDCO = [(0.1, "exponential", 3, 5), (0.02, "pareto", 1, 1), (0.05, "gamma", 2, 2), (0.05, "exponential", 9, 1), (0.4, "gamma", 1, 3)]


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("ratio,law,stages,every", SIDCO)
def test_sidco(world, ratio, law, stages, every, memory, size):
    """Every distribution and number of stages, with one controller per rank and tensor, is exact on the grid."""
    one = {rank: Sidco(ratio, law, stages, every=every) for rank in range(size)}
    g = grace_ext.grace(f"sidco(ratio={ratio}, distribution={law!r}, stages={stages}, every={every}) + {memory}")
    compare(world, g, Stepwise(lambda x, rank, step: one[rank](x)), size, VECTOR, relative=2.0**-24 if size == 3 else 0, exact=True)


def test_sidco_controllers_are_of_one_tensor(world):
    """Each tensor has its own controller (the authors' code shares one): a wide distribution does not disturb a narrow one, and the
    controller finds the right number of stages from a wrong start."""
    cluster = world.cluster(grace_ext.grace("sidco(ratio=0.01, stages=1, every=1) + none"), 1)
    generator = np.random.default_rng(1)
    for _ in range(8):
        gaussian = generator.standard_normal(20000).astype(np.float32)
        laplace = generator.laplace(size=20000).astype(np.float32)
        out = world.step(cluster, [{"gaussian": gaussian, "laplace": laplace, "zero": np.zeros(2000, np.float32)}])
    (held,) = states(cluster, world)
    assert held["sidco_stages/laplace"][0] == 1 and held["sidco_stages/gaussian"][0] >= 2
    for name in ("gaussian", "laplace"):
        assert 0.75 * 200 < np.count_nonzero(out[name]) < 1.3 * 200


@pytest.mark.parametrize("law", ["exponential", "pareto", "gamma"])
def test_sidco_sends_about_k(law):
    """Over many steps the mean number of sent elements is within 25% of k, for Gaussian and Laplacian gradients, and for heavy-tailed ones
    except with the exponential law, which has no such tail."""
    generator = np.random.default_rng(2)
    draws = {"gaussian": generator.standard_normal, "laplace": lambda n: generator.laplace(size=n)}
    if law != "exponential":
        draws["heavy"] = lambda n: generator.standard_t(3, n)
    for kind, draw in draws.items():
        cluster, total = NUMPY.cluster(grace_ext.grace(f"sidco(ratio=0.01, distribution={law!r}, every=2) + none"), 1), 0
        for _ in range(40):
            total += np.count_nonzero(NUMPY.step(cluster, [{"w": draw(20000).astype(np.float32)}])["w"])
        assert 0.75 < total / 40 / 200 < 1.25, kind


@pytest.mark.parametrize("law", ["exponential", "pareto", "gamma"])
def test_sidco_of_odd_tensors(world, law):
    """One non-zero, equal magnitudes, few non-zeros, one huge element, subnormals: something is sent, and it equals the input."""
    cases = [[-3.0] + [0] * 63, [2.0] * 64, [0] * 62 + [1.0, -1], [1e-3] * 63 + [3e38], [1.4e-45] * 64, [5.0]]
    for case in cases:
        x = np.array(case * (1 if len(case) > 1 else 64), np.float32)
        out = world.step(world.cluster(grace_ext.grace(f"sidco(ratio=0.05, distribution={law!r}) + none"), 1), [{"w": x}])["w"]
        assert out.any() and np.array_equal(out[out != 0], x[out != 0])


def adaq(ratio):
    def one(x):
        out = np.zeros_like(x)
        for side in (np.flatnonzero(x > 0), np.flatnonzero(x < 0)):
            if side.size:
                chosen = side[largest(x[side], count(ratio, side.size))]
                out[chosen] = x[chosen].mean()
        return out

    return oracles.averaged(one)


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("ratio", [0.1, 0.001, 1])
def test_adaq(world, ratio, memory, size):
    """adaq sends a share of each sign, all with that sign's mean."""
    compare(world, grace_ext.grace(f"adaq(ratio={ratio}) + {memory}"), adaq(ratio), size, VECTOR, relative=3e-6)


def test_adaq_of_one_sign(world):
    """A sign without elements sends none: inputs are all positive or all negative, with zeros between."""
    for sign in (1, -1):
        x = np.array([0, 5, 3, 0, 4, 1], np.float32) * sign
        out = world.step(world.cluster(grace_ext.grace("adaq(ratio=0.5) + none"), 1), [{"w": x}])["w"]
        assert np.array_equal(out, np.array([0, 4.5, 0, 0, 4.5, 0]) * sign)


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("tau,multi", [(4, False), (7.9375, False), (0.5, True), (3, True), (2.0**-16, True)])
def test_strom(world, tau, multi, memory, size):
    """strom sends one threshold per element and step, or its nearest multiple (ties to even, 65536 at most); the rest stays, exactly."""

    def one(x):
        times = np.minimum(np.rint(abs(x) / tau), 65536) if multi else 1.0
        return np.where(abs(x) >= tau, np.sign(x) * tau * times, 0.0)

    g = grace_ext.grace(f"strom(threshold={tau}, multi={multi}) + {memory}")
    compare(world, g, oracles.averaged(one), size, VECTOR, relative=2.0**-24 if size == 3 else 0, exact=True)


@RUNS
@pytest.mark.parametrize("scale", [False, True])
def test_randblock(world, scale, size):
    """randblock sends k neighbours from a start that all ranks share, wraps around the end, and scales by d / k if `scale` is set."""
    d, k = VECTOR[0], 39

    def one(x, rank, step):
        low, high = (int(w) for w in rng.words(info(step, 0).shared_key("w", "randblock"), 2))
        start = int((low + high * 2**32) * d // 2**64)
        return only(x, (start + np.arange(k)) % d) * (d / k if scale else 1)

    memory = "none" if scale else "residual"
    g = grace_ext.grace(f"randblock(ratio=0.2, scale={scale}) + {memory}")
    relative = 1e-5 if scale else 2e-7 if size == 3 else 0
    compare(world, g, Stepwise(one), size, VECTOR, relative=relative, exact=not scale)
    starts = {int(rng.words(info(s, 0).shared_key("w", "randblock"), 2)[1]) * d >> 32 for s in range(200)}
    assert len(starts) > 90 and max(starts) > d - k  # everywhere, also so that blocks wrap around
