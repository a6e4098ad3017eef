"""Tests epsilon against known values, and the noise that a wanted epsilon needs."""

from __future__ import annotations

import math
import sys

import pytest

import grace_ext
from grace_ext import LocalCluster
from grace_ext.errors import ParameterError, UnsupportedError
from grace_ext.privacy import Privacy

#: (noise multiplier, sample rate, steps) -> epsilon at delta 1e-5 by privacy loss distributions; the first follows from the exact formula,
#: too: delta = Phi(1/2 - e) - exp(e) Phi(-1/2 - e).
KNOWN = [
    (1, 1, 1, 4.3772),
    (10, 1, 100, 4.3772),
    (1.1, 256 / 60000, 14040, 2.3796),
    (1.0, 0.01, 1000, 1.8282),
    (4.0, 0.01, 10000, 0.9470),
    (0.7, 0.0128, 2000, 8.0026),
]


def by_examples(noise, rate):
    return Privacy(noise_multiplier=noise, sample_rate=rate, unit="example", batch=1)


@pytest.mark.parametrize(("noise", "rate", "steps", "epsilon"), KNOWN)
def test_known_epsilons(noise, rate, steps, epsilon):
    assert by_examples(noise, rate).epsilon(1e-5, steps) == pytest.approx(epsilon, abs=1e-3)


def test_one_step_agrees_with_the_exact_formula():
    """Balle and Wang's formula for the Gaussian mechanism, solved by bisection, without the accountant."""

    def cdf(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    low, high = 0.0, 20.0
    while high - low > 1e-9:
        e = (low + high) / 2
        low, high = (e, high) if cdf(0.5 - e) - math.exp(e) * cdf(-0.5 - e) > 1e-5 else (low, e)
    assert Privacy(noise_multiplier=1).epsilon(1e-5, 1) == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize(("epsilon", "steps"), [(8, 300), (1, 300)])
def test_the_noise_for_an_epsilon_is_enough_and_hardly_more(epsilon, steps):
    """The values are those of q = 256 / 4000 and 300 steps: 0.972 and 4.284."""
    privacy = by_examples(1, 256 / 4000)
    noise = privacy.noise_for(epsilon, 1e-5, steps)
    assert noise == pytest.approx({8: 0.972, 1: 4.284}[epsilon], abs=2e-3)
    assert by_examples(noise, 256 / 4000).epsilon(1e-5, steps) <= epsilon
    assert by_examples(noise - 2e-3, 256 / 4000).epsilon(1e-5, steps) > epsilon


def test_borders():
    assert Privacy().epsilon(1e-5, 0) == 0
    assert Privacy(noise_multiplier=0).epsilon(1e-5, 1) == math.inf
    for delta in (0, 1, -1, True, "1e-5", math.nan):
        with pytest.raises(ParameterError, match="delta must be a number above 0 and below 1"):
            Privacy().epsilon(delta, 1)
    for steps in (-1, 1.5, True, None):
        with pytest.raises(ParameterError, match="steps must be a whole number"):
            Privacy().epsilon(1e-5, steps)
    with pytest.raises(ParameterError, match="epsilon must be"):
        Privacy().noise_for(0, 1e-5, 1)
    with pytest.raises(ParameterError, match="steps must be at least 1"):
        Privacy().noise_for(1, 1e-5, 0)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'grace_ext\[privacy\]'"):
        Privacy().epsilon(1e-5, 1)


def test_epsilon_counts_every_step_and_goes_on_behind_a_checkpoint():
    cluster, again = (LocalCluster("gaussian(noise_multiplier=10) | topk + residual", 2) for _ in range(2))
    assert cluster.epsilon(1e-5) == 0
    for _ in range(3):
        cluster.step([{"w": [1.0, 2.0]}] * 2)
    again.load_state_dict(cluster.state_dict())
    again.step([{"w": [1.0, 2.0]}] * 2)
    assert cluster.epsilon(1e-5) == pytest.approx(Privacy(noise_multiplier=10).epsilon(1e-5, 3))
    assert again.epsilon(1e-5) == pytest.approx(Privacy(noise_multiplier=10).epsilon(1e-5, 4))
    with pytest.raises(UnsupportedError, match="makes no gradient private"):
        LocalCluster("none", 2).epsilon(1e-5)


def test_epsilon_goes_on_behind_a_checkpoint_of_another_number_of_ranks(tmp_path):
    privacy = Privacy(noise_multiplier=10)
    cluster, larger = (LocalCluster("topk + residual", ranks, privacy=privacy) for ranks in (2, 3))
    for _ in range(3):
        cluster.step([{"w": [1.0, 2.0]}] * 2)
    grace_ext.save(cluster, tmp_path)
    grace_ext.load(larger, tmp_path, resize="mean")
    assert larger.epsilon(1e-5) == pytest.approx(privacy.epsilon(1e-5, 3))
