"""Compares Accordion's decisions with its rule in float64."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import ParameterError
from grace_ext.testing.worlds import NUMPY

POLICY = "accordion(high=topk(ratio=0.5) + residual, low=topk(ratio=0.05) + residual, interval=4, threshold={})"


def sends(policy, norms, lrs=None, size=2):
    """Returns whether each step was sent with `high`, for gradients of these norms, and the aggregates."""
    cluster = NUMPY.cluster(grace_ext.grace(policy), size)
    direction = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    high, results = [], []
    for step, norm in enumerate(norms):
        high.append(None)
        results.append(NUMPY.step(cluster, [{"w": direction * np.float32(norm)}] * size, lr=None if lrs is None else lrs[step])["w"])
        high[-1] = cluster.wire_bytes[0]
    return [size == high[0] for size in high], results  # the first step is sent with `high`


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_the_rule(threshold):
    """A window is critical if |D_before - D| >= threshold D_before, with D the norm of its summed aggregates; the first one always is."""
    norms = np.repeat([1.0, 1.05, 1.4, 1.4, 0.5, 0.5, 3.0, 3.1, 0.1, 0.1], 4)
    high, results = sends(POLICY.format(threshold), norms)
    expected, before = [True] * 4, None
    for window in range(len(norms) // 4):
        now = np.linalg.norm(np.sum([r.astype(np.float64) for r in results[4 * window : 4 * window + 4]], axis=0))
        expected += [before is None or abs(before - now) >= threshold * before] * 4
        before = now
    assert high == expected[: len(high)] and 0 < sum(high) < len(high)


def test_the_threshold_is_a_knob():
    """Bug 35: the authors' code always uses 0.5 and ignores the argument."""
    norms = np.repeat([1.0, 1.3, 1.6, 2.0], 4)
    assert sum(sends(POLICY.format(0.1), norms)[0]) > sum(sends(POLICY.format(2.0), norms)[0])


def test_a_norm_of_zero_before_is_critical():
    """Bug 35: another copy divides by the norm before."""
    high, _ = sends(POLICY.format(0.5), np.repeat([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], 4))
    assert high[8:16] == [True] * 8  # nothing before, then from zero to a norm of 1


def test_a_fall_of_the_learning_rate_is_critical_and_a_slow_decay_is_not():
    # Without error feedback, and with a `low` close to `high`, the norms of the aggregates stay constant.
    norms, policy = np.ones(32), POLICY.format(0.5).replace("residual", "none").replace("0.05", "0.4")
    steady, _ = sends(policy, norms, lrs=[0.1] * 32)
    slow, _ = sends(policy, norms, lrs=[0.1 * 0.98**t for t in range(32)])
    fallen, _ = sends(policy, norms, lrs=[0.1] * 18 + [0.01] * 14)
    assert steady == slow and not any(steady[12:])
    assert fallen[20:24] == [True] * 4 and not any(fallen[24:])


def test_each_tensor_has_a_regime_of_its_own():
    cluster = NUMPY.cluster(grace_ext.grace(POLICY.format(0.6).replace("residual", "none")), 2)
    direction = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    for step in range(16):
        g = {"steady": direction, "growing": direction * np.float32(2.0 ** (step // 4))}
        NUMPY.step(cluster, [g, g])
    regimes = {name: float(cluster.drivers[1].state[name]["policy:regime"][1]) for name in ("steady", "growing")}
    assert regimes == {"steady": 0, "growing": 1}


def test_ranks_and_bits():
    """Accordion can switch between PowerSGD ranks and between numbers of bits; the bytes sent are those of `high`, then of `low`."""
    for high, low in (("powersgd(rank=4) + none", "powersgd(rank=1) + none"), ("qsgd(bits=8) + none", "qsgd(bits=6) + none")):
        cluster = NUMPY.cluster(grace_ext.grace(f"accordion(high={high}, low={low}, interval=2, threshold=0.9)"), 2)
        sizes, norms = [], []
        for _ in range(8):
            g = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
            norms.append(np.linalg.norm(NUMPY.step(cluster, [{"w": g}, {"w": g}])["w"]))
            sizes.append(cluster.wire_bytes[0])
        plain = []
        for spec in (high, low):
            other = NUMPY.cluster(grace_ext.grace(spec), 2)
            NUMPY.step(other, [{"w": g}, {"w": g}])
            plain.append(other.wire_bytes[0])
        assert sizes[0] == plain[0] and sizes[-1] == plain[1], (sizes, norms)


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("topk(ratio=0.01) + residual", "sidco(ratio=0.001) + residual"),
        ("dgc(ratio=0.01) + residual", "global_topk(ratio=0.001) + residual"),
        ("topk(ratio=0.05) + residual", "atomo(rank=1) + none"),
        ("powersgd(rank=32) + residual", "powersgd_plus(rank=2) + residual"),
        ("topk(ratio=0.01) + residual", "threshold(threshold=100.0) + residual"),  # only the gradients decide how much
        ("none", "inceptionn + none"),
        ("signsgd + none @ allreduce", "qsgd(bits=2) + none"),  # a byte per element: counters, not bits
    ],
)
def test_expected_bytes_are_compared(high, low):
    """`high` must be expected to send at least as much as `low`; the worst case of a payload whose size varies says little."""
    assert grace_ext.grace(f"accordion(high={high}, low={low})").policy.interval == 100
    if "threshold" not in low and "inceptionn" not in low:
        with pytest.raises(ParameterError, match="Swap them"):
            grace_ext.grace(f"accordion(high={low}, low={high})")
