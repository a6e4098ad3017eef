"""Checks claims of Rethinking gradient sparsification as total error minimization (Sahu et al. 2021) that take under a minute."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.papers.problems import Logistic, descend, elements_sent, state_of
from grace_ext.exchange.message import HEADER

WORKERS, ROWS, COLUMNS = 20, 1200, 300


@pytest.fixture(scope="module")
def problem() -> tuple[Logistic, np.ndarray]:
    logistic = Logistic.random(ROWS, COLUMNS, 1e-4)
    return logistic, logistic.minimum()


def run(spec: str, problem, steps: int) -> tuple[dict[int, float], float, float]:
    """Returns (f - f* by step, the sum over steps of the mean |gamma e_i|^2, values sent per worker and step). A batch is one row."""
    logistic, best = problem
    generator = np.random.default_rng(100)
    picks = [[i * (ROWS // WORKERS) + int(generator.integers(ROWS // WORKERS)) for i in range(WORKERS)] for _ in range(steps)]
    gap, error, sent = {}, [], []

    def watch(step, x, cluster):
        gap[step] = logistic.value(x) - logistic.value(best)
        error.append(np.mean([np.sum((logistic.gamma * e.astype(np.float64)) ** 2) for e in state_of(cluster, "residual")]))
        if "threshold" in spec:
            sent.extend(elements_sent(size, COLUMNS) for size in cluster.wire_bytes)

    gradients = lambda x, step: [logistic.gradient(x, [row]) for row in picks[min(step, steps - 1)]]  # noqa: E731
    descend(spec, gradients, best + 0.3, logistic.gamma, steps, watch)
    return gap, sum(error), float(np.mean(sent)) if sent else 1.0


def test_a_hard_threshold_beats_topk_at_equal_volume(problem):
    """Both send one element per worker and step. Top-1's error peaks early and slows it down; the threshold's stays bounded."""
    steps, gamma = 110, problem[0].gamma
    top, top_error, _ = run("topk(ratio=0.003) + residual", problem, steps)
    hard, hard_error, volume = run(f"threshold(threshold={0.9 / gamma}) + residual", problem, steps)
    assert volume == pytest.approx(1.0, rel=0.1)
    assert top_error > 3 * hard_error
    assert top[100] > 10 * hard[100]


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
    shares = [slice(i * rows // workers, (i + 1) * rows // workers) for i in range(workers)]
    gradients = lambda x, step: [logistic.gradient(x, share) for share in shares]  # noqa: E731
    threshold = 1e-3 / logistic.gamma

    def shifted(cluster):
        for driver, share in zip(cluster.drivers, shares, strict=True):
            state = {"residual/x": np.zeros(columns, np.float32), "shift/x": logistic.gradient(best, share).astype(np.float32)}
            driver.load_state_dict({**driver.state_dict(), "state": state})

    sent: dict[str, list[int]] = {"residual": [], "ef_star": []}
    gaps = {}
    for memory in sent:
        watch = lambda step, x, cluster, memory=memory: sent[memory].append(sum(cluster.wire_bytes))  # noqa: E731
        x = descend(
            f"threshold(threshold={threshold}) + {memory}", gradients, best + 0.3, logistic.gamma, steps, watch,
            shifted if memory == "ef_star" else lambda cluster: None,
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
    floors = {}
    for n in sizes:
        generator = np.random.default_rng(7)
        late: list[float] = []
        gradients = lambda x, step, n=n: [x + generator.standard_normal(50) for _ in range(n)]  # noqa: E731, B023
        descend(spec, gradients, np.zeros(50), 0.02, 1200, lambda step, x, cluster: late.append(x @ x / 2) if step > 400 else None)  # noqa: B023
        floors[n] = np.mean(late)
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
