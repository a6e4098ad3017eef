"""Checks claims of Rethinking gradient sparsification as total error minimization (Sahu et al. 2021) that take under a minute."""

from __future__ import annotations

import numpy as np
import pytest

from grace_ext.exchange.message import HEADER
from grace_ext.papers.ef_star import shifted
from grace_ext.papers.linear_speedup import floor
from grace_ext.papers.logistic import trace
from grace_ext.papers.problems import Logistic, descend, state_of

ROWS, COLUMNS = 1200, 300


@pytest.fixture(scope="module")
def problem() -> tuple[Logistic, np.ndarray]:
    logistic = Logistic.random(ROWS, COLUMNS, 1e-4)
    return logistic, logistic.minimum()


def test_a_hard_threshold_beats_topk_at_equal_volume(problem):
    """Both send one element per worker and step. Top-1's error peaks early and slows it down; the threshold's stays bounded."""
    logistic, best = problem
    top = trace(logistic, best, 0.3, "topk(ratio=0.003) + residual", 110, 100)
    hard = trace(logistic, best, 0.3, f"threshold(threshold={0.9 / logistic.gamma}) + residual", 110, 100)
    assert hard.sent.mean() == pytest.approx(1.0, rel=0.1)
    assert sum(top.error) > 3 * sum(hard.error)
    assert top.gap[99] > 10 * hard.gap[99]


def test_threshold_error_is_bounded_whatever_the_gradient_is(problem):
    """|e|^2 <= lambda^2 d holds at every step: an absolute compressor needs no bound on the gradient."""
    limit = 3.0
    logistic, best = problem

    def watch(step, x, cluster):
        assert all(np.sum(e.astype(np.float64) ** 2) <= limit**2 * COLUMNS for e in state_of(cluster, "residual"))

    gradients = lambda x, step: [50 * logistic.gradient(x, slice(i * 60, i * 60 + 60)) for i in range(4)]  # noqa: E731
    descend(f"threshold(threshold={limit}) + residual", gradients, best + 0.3, logistic.gamma / 50, 100, watch)


def test_the_shift_keeps_a_threshold_sparse_near_the_optimum():
    """EF-GDstar stays sparse: with heterogeneous workers and a small threshold, plain error feedback sends more and more near the optimum,
    because local gradients do not vanish there; shifted by each worker's gradient at the optimum, it converges and sends almost nothing."""
    rows, columns, workers, steps = 400, 100, 5, 1500
    logistic = Logistic.random(rows, columns, 1e-3)
    best = logistic.minimum()
    gradients = lambda x, step: [logistic.gradient(x, share) for share in logistic.shares(workers)]  # noqa: E731
    threshold = 1e-3 / logistic.gamma

    sent: dict[str, list[int]] = {"residual": [], "ef_star": []}
    gaps = {}
    for memory in sent:
        watch = lambda step, x, cluster, memory=memory: sent[memory].append(sum(cluster.wire_bytes))  # noqa: E731
        x = descend(
            f"threshold(threshold={threshold}) + {memory}", gradients, best + 0.3, logistic.gamma, steps, watch,
            shifted(logistic, best, workers) if memory == "ef_star" else lambda cluster: None,
        )  # fmt: skip
        gaps[memory] = logistic.value(x) - logistic.value(best)
    overhead = workers * (HEADER.size + 8)
    plain, star = (np.mean(sent[m][-200:]) - overhead for m in ("residual", "ef_star"))
    assert plain > 10 * max(star, 1)
    assert gaps["ef_star"] < 1e-3


@pytest.mark.parametrize(
    ("spec", "sizes"), [("none", (1, 4, 16)), ("threshold(threshold=1.0) + residual", (1, 4)), ("topk(ratio=0.1) + residual", (1, 4))]
)
def test_linear_speed_up(spec, sizes):
    """The noise floor of SGD with error feedback falls about as 1/n, for f = |x|^2 / 2 and unit noise on every worker's gradient."""
    floors = {n: floor(spec, n, seed=7, steps=1200) for n in sizes}
    assert all(2.5 < floors[n] / floors[m] < 6 for n, m in zip(sizes, sizes[1:], strict=False))


def test_dgc_masking_stops_momentum_that_has_been_applied():
    """Gradients are constant for ten steps, then zero. Without masking, momentum left after an element was sent moves it further, by
    m / (1 - m) of its gradients; with masking, a sent element moves no further."""
    pushed, on = {}, np.array([1.0, 0.5, 0.25, 0.0])
    for masking in (True, False):
        late: list[float] = []

        def watch(step, x, cluster, late=late):
            late.append(-x.sum())

        spec = f"topk(ratio=0.75, values='fp32') + dgc(momentum=0.9, masking={masking})"
        descend(spec, lambda x, step: [on if step < 10 else 0 * on], np.zeros(4), 1.0, 200, watch)
        pushed[masking] = (late[9], late[-1])
    assert pushed[True][0] == pushed[True][1] == pytest.approx(10 * 1.75)
    assert pushed[False][1] == pytest.approx(10 * 1.75 / (1 - 0.9), rel=1e-3)
