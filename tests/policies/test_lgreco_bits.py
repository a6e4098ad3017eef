"""Tests L-GreCo over quantizers: which bits it chooses from, and that its decision is the best of all, by tables in float64."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts import rng
from grace_ext.parts.tensor import StepInfo
from grace_ext.policies.losses import of_adam
from grace_ext.testing.worlds import NUMPY

from .test_lgreco import SHAPES, gradients, settings

#: By the base's bits: those that are chosen from.
CHOICES = {4: (2, 3, 4, 5, 6, 7, 8), 8: (4, 5, 6, 7, 8, 10, 12, 14, 16)}


def quantized(x: np.ndarray, bits: int, name: str) -> np.ndarray:
    """Returns qsgd of x, float64[d], in blocks of 512, with the draws of a first step of one rank."""
    s, out = 2 ** (bits - 1) - 1, np.zeros(len(x))
    words = rng.words(StepInfo(0, 0, 1, 1).private_key(name, "qsgd"), len(x)).astype(np.int64)
    for start in range(0, len(x), 512):
        at = slice(start, start + 512)
        norm = np.linalg.norm(x[at]) or 1.0
        scaled = np.abs(x[at]) / norm * s
        levels = np.floor(scaled) + (words[at] // 256 < (scaled - np.floor(scaled)) * 2**24)
        out[at] = np.sign(x[at]) * levels * norm / s
    return out


def nbytes(elements: int, bits: int) -> int:
    return math.ceil(elements * bits / 8) + 4 * math.ceil(elements / 512)


@pytest.mark.parametrize("base", CHOICES)
@pytest.mark.parametrize("seed", range(3))
def test_the_decision_is_the_best_of_all(world, seed, base):
    """The bits that 2 ranks choose over qsgd send least of all combinations within the budget of errors; tables in float64 are the mean of
    the ranks' errors, each for its own sum of the window's gradients. The next steps send fewer bytes than a uniform choice."""
    cluster, bits = world.cluster(grace_ext.grace(f"lgreco(every=5, window=3, base=qsgd(bits={base}))"), 2), CHOICES[base]
    assert cluster.grace.policy.values == bits
    sums, sent = {name: np.zeros((2, math.prod(shape))) for name, shape in SHAPES.items()}, []
    for step in range(6):
        by_rank = gradients(100 * seed + step)
        world.step(cluster, by_rank)
        sent.append(cluster.wire_bytes[0])
        for name, rank in itertools.product(SHAPES, range(2)) if 2 <= step < 5 else ():
            sums[name][rank] += by_rank[rank][name].astype(np.float64).reshape(-1)
    errors = {n: [np.mean([np.linalg.norm(x - quantized(x, b, n)) for x in xs]) for b in bits] for n, xs in sums.items()}
    sizes = {name: [nbytes(xs.shape[1], b) for b in bits] for name, xs in sums.items()}
    budget = sum(of_name[bits.index(base)] for of_name in errors.values())

    def best(allowed: float) -> int:
        combinations = itertools.product(range(len(bits)), repeat=3)
        within = [c for c in combinations if sum(errors[n][i] for n, i in zip(SHAPES, c, strict=True)) <= allowed]
        return min(sum(sizes[n][i] for n, i in zip(SHAPES, c, strict=True)) for c in within)

    chosen = {name: int(number) for name, number in settings(cluster)[1].items()}
    assert settings(cluster)[0] == settings(cluster)[1]
    assert best(budget) <= sum(sizes[n][chosen[n]] for n in SHAPES) <= best(budget * (1 - 3e-4))
    assert sum(errors[n][chosen[n]] for n in SHAPES) <= budget * (1 + 1e-6)
    assert sum(sizes[n][chosen[n]] for n in SHAPES) < sum(sizes[n][bits.index(base)] for n in SHAPES)
    assert sent[5] < sent[0]


@pytest.mark.parametrize(("base", "expected"), [("qsgd", (4, 5, 6, 7, 8, 10, 12, 14, 16)), ("qsgd(bits=3)", (2, 3, 4, 5, 6))])
def test_the_bits_that_it_chooses_from(base, expected):
    """It chooses from half to twice the base's bits, within 2 to 16, and from at most 10 values. Without a number qsgd has 8."""
    policy = grace_ext.grace(f"lgreco(base={base})").policy
    assert policy.values == expected
    assert [leaf.compressor.s for leaf in policy.leaves] == [2 ** (b - 1) - 1 for b in expected]
    assert policy.leaves[policy.uniform].compressor.s == policy.base.compressor.s


@pytest.mark.parametrize("base", ["qsgd(levels=127)", "terngrad", "sketch + residual"])
def test_quantizers_without_a_number_of_bits_are_refused(base):
    with pytest.raises(IncompatiblePartsError, match=r"ratio or rank or bits of a compressor, and .* has none that is set; use"):
        grace_ext.grace(f"lgreco(base={base})")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("base=qsgd(bits=2)", r"bits=2 of .* is the smallest of its choices, .*alpha below 1"),
        ("base=qsgd(bits=16), alpha=0.9", r"bits=16 of .* is the largest of its choices, .*alpha above 1"),
        ("base=powersgd(rank=1) + residual", "rank=1 of .* is the smallest"),
        ("base=topk(ratio=0.01) + residual, low=1", "ratio=0.01 of .* is the smallest"),
        ("base=qsgd(bits=2), alpha=0.9", ""),
        ("base=qsgd(bits=4)", ""),
    ],
)
def test_a_base_at_the_end_of_its_choices_cannot_save_anything_and_says_so(spec, said):
    notices = grace_ext.grace(f"lgreco({spec})").policy.notices([])
    assert len(notices) == bool(said)
    if said:
        assert re.search(said, notices[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_adam_loses_to_an_unbiased_quantizer(bits):
    """The lost descent of a step of length sqrt(d) along C(x), against the definition with C(x) itself. By the formula of projections it
    would be more than there is to lose, for few bits."""
    x = np.random.default_rng(0).standard_normal(100_000)
    c = quantized(x, bits, "w")
    expected = math.sqrt(x.size) * (np.linalg.norm(x) - x @ c / np.linalg.norm(c))
    (found,) = of_adam([float(np.linalg.norm(x - c))], x, unbiased=True)
    assert found == pytest.approx(expected, rel=0.02)
    if bits == 2:
        assert found < math.sqrt(x.size) * np.linalg.norm(x) < of_adam([float(np.linalg.norm(x - c))], x)[0]


def test_adam_over_qsgd_keeps_the_budget_of_lost_descent():
    cluster = NUMPY.cluster(grace_ext.grace("lgreco(every=2, window=1, error=adam, alpha=2, base=qsgd(bits=4))"), 2)
    policy = cluster.grace.policy
    for step in range(2):
        NUMPY.step(cluster, gradients(step))
    lost = {}
    for name in SHAPES:
        by_rank = []
        for x in (g[name].astype(np.float64).reshape(-1) for g in gradients(1)):
            norm, errors = np.linalg.norm(x), np.array([np.linalg.norm(x - quantized(x, b, name)) for b in policy.values])
            by_rank.append(math.sqrt(x.size) * (norm - norm**2 / np.hypot(norm, errors)))
        lost[name] = np.mean(by_rank, axis=0)
    chosen = settings(cluster)[0]
    assert sum(lost[n][int(chosen[n])] for n in SHAPES) <= 2 * sum(row[policy.uniform] for row in lost.values()) * (1 + 1e-5)
    assert len(set(chosen.values())) > 1
