"""Biased compressors without error feedback fail on problems that SGD solves, and converge with it: the constructions of Karimireddy et al.
(2019) and Beznosikov et al. (2020), with their exact numbers if they state some."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.papers.problems import descend

# f_i(x) = <a_i, x>^2 + |x|^2 / 4
CUBE = np.array([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]])


def cube(x: np.ndarray, step: int) -> list[np.ndarray]:
    return [2 * (a @ x) * a + x / 2 for a in CUBE]


def test_top1_without_feedback_grows_exactly_as_computed():
    """Every worker sends its own largest entry, which points away from the optimum: x is multiplied by 1 + 11 gamma / 6 per step."""
    x = descend("topk(ratio=0.1) + none", cube, np.ones(3), 0.01, 200)
    assert x == pytest.approx(np.full(3, (1 + 11 * 0.01 / 6) ** 200), rel=1e-4) and 37 < x[0] < 38
    value = sum((a @ x) ** 2 + x @ x / 4 for a in CUBE) / 3
    assert value > 1000


@pytest.mark.parametrize("memory", ["residual", "ef21", "efsignsgd"])
def test_top1_with_feedback_converges(memory):
    """On the same problem, with the same rate, error feedback converges."""
    x = descend(f"topk(ratio=0.1) + {memory}", cube, np.ones(3), 0.01, 2000)
    assert np.abs(x).max() < 1e-4


def test_signs_without_feedback_never_leave_a_line():
    """f = <a_1, x>^2 + <a_2, x>^2, a = +-(1, -1) + eps (1, 1), one term per step: signs are always +-(1, -1), so x_1 + x_2 stays 2."""
    terms = [np.array([1, -1.0]) + 0.5, np.array([-1, 1.0]) + 0.5]
    generator = np.random.default_rng(0)
    picks = generator.integers(2, size=4000)

    def gradient(x, step):
        a = terms[picks[min(step, 3999)]]
        return [2 * (a @ x) * a]

    stuck = descend("signsgd + none", gradient, np.ones(2), 0.003, 4000)
    assert stuck.sum() == pytest.approx(2.0, abs=1e-3)
    free = descend("efsignsgd + residual", gradient, np.ones(2), 0.02, 4000)
    assert np.abs(free).max() < 1e-3


def test_the_sign_of_a_noisy_gradient_points_the_wrong_way():
    """The gradient is 4 with probability 1/4, else -1: its mean is 1/4, its mean sign -1/2. On [-1, 1] the optimum is -1."""
    generator = np.random.default_rng(3)
    draws = np.where(generator.random(4001) < 0.25, 4.0, -1.0)
    ends = {}
    for spec in ("signsgd + none", "efsignsgd + residual"):
        cluster, x, late = grace_ext.LocalCluster(grace_ext.grace(spec), 1), 0.0, []
        for step in range(4000):
            out = cluster.step([{"x": np.array([draws[step]])}])["x"][0]
            x = float(np.clip(x - 0.01 * out, -1, 1))
            late += [x] if step > 2000 else []
        ends[spec] = np.mean(late)
    assert ends["signsgd + none"] > 0.9 and ends["efsignsgd + residual"] < -0.7
