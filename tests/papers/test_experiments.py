"""Tests the experiments' own computations: means, conditions, thresholds of equal volume, steps to a target, bytes received."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="pip install 'grace_ext[torch]'")

from grace_ext.papers import lqsgd, time_to_target, volumes  # noqa: E402
from grace_ext.papers.compared import at_least, mean, nbytes, row, sd  # noqa: E402
from grace_ext.studies.training import Run  # noqa: E402


def runs(*scores, curve=(), spec="a"):
    return [Run(spec, seed, 0.01, score, 10.0 * (seed + 1), list(curve)) for seed, score in enumerate(scores)]


def test_means_spread_and_conditions():
    found = runs(96.0, 98.0)
    assert (mean(found), nbytes(found), sd(found), sd(runs(1.0))) == (97.0, 15.0, pytest.approx(2**0.5), 0.0)
    assert row(found) == ["a", "97.00 ± 1.41", 15.0, 0.01]
    assert at_least("x", found, runs(97.2), 0.3).holds and not at_least("x", found, runs(97.4), 0.3).holds
    assert at_least("x", runs(2.5), runs(2.6), 0.0, higher_is_better=False).measured == pytest.approx(0.1)
    assert not at_least("x", runs(2.7), runs(2.6), 0.0, higher_is_better=False).holds


def test_a_threshold_of_the_same_volume_sends_no_more():
    """The number of bytes falls with the threshold, here as 1 / threshold; the largest threshold that is tried bounds it from above."""
    asked, done = [], []

    def start(spec, seed, **options):
        asked.append((seed, options))
        value = float(spec.partition("threshold=")[2].partition(")")[0])
        return SimpleNamespace(result=lambda: Run(spec, seed, 0.01, 0.0, 1 / value, []))

    found = volumes.thresholds(SimpleNamespace(start=start, tuning_seed=7), [10.0, 1000.0], 12, lambda: done.append(1), steps=3)
    values = [float(spec.partition("threshold=")[2].partition(")")[0]) for spec in found]
    assert values == [pytest.approx(0.1, rel=0.01), pytest.approx(0.001, rel=0.01)]
    assert all(1 / value <= most for value, most in zip(values, (10.0, 1000.0), strict=True))
    assert len(asked) == len(done) == 24 and {options["steps"] for _, options in asked} == {3} and {seed for seed, _ in asked} == {7}


def test_steps_to_a_target():
    points = ((20, 90.0), (40, 95.0), (60, 94.0))
    (up,), (down,) = runs(94.0, curve=points), runs(2.0, curve=((20, 4.0), (40, 3.1)))
    assert time_to_target.steps_to(up, 95.0, True) == 40 and time_to_target.steps_to(up, 95.1, True) == math.inf
    assert time_to_target.steps_to(down, 3.2, False) == 40 and time_to_target.steps_to(down, 3.1, False) == 40
    assert time_to_target.steps_to(down, 3.0, False) == math.inf


def test_bytes_received_are_those_of_the_audit():
    """1,000 x 1,000 at rank 1: two factors of 1,000 float32 and 8 bytes of flags; or as many codes of 8 bits, 8 bytes each and headers."""
    plain, gathered, scattered = lqsgd.LINES
    assert [lqsgd.sent(plain, n) for n in (2, 8)] == [8008, 14014]
    assert [lqsgd.sent(gathered, n) for n in (2, 8)] == [2056, 14392]
    assert lqsgd.sent(scattered, 8) < 8008
