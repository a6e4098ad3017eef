"""PowerSGD can stall for ever, and PowerSGD+ does not: a construction with exact gradients (Xie, Chen, Yuan 2025)."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext

A = np.diag([1.0, 2, 3])


def distance(spec: str, steps: int = 2000, rate: float = 0.1) -> float:
    """Returns |X - A| after gradient descent on |X - A|^2 / 2 from X = 0, if the subspace starts as the first axis."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 1)
    driver = cluster.drivers[0]
    first = driver.grace.compressor.init(driver.ops, grace_ext.parts.TensorSpec("X", (3, 3)), driver.step_info())
    state = {f"{key}/X": np.asarray(array) for key, array in first.items()}
    state |= {"powersgd_q/X": np.array([1, 0, 0], np.float32), "residual/X": np.zeros(9, np.float32)}
    driver.load_state_dict({**driver.state_dict(), "state": state})
    x = np.zeros((3, 3))
    for _ in range(steps):
        x = x - rate * np.asarray(cluster.step([{"X": x - A}])["X"], np.float64)
    return float(np.linalg.norm(x - A))


def test_powersgd_never_sees_what_is_orthogonal_to_its_subspace():
    """The residual stays diagonal, so M Q stays parallel to the first axis: entries 2 and 3 never move, in spite of error feedback."""
    assert distance("powersgd(rank=1) + residual") == pytest.approx(13**0.5, abs=1e-4)


@pytest.mark.parametrize("refresh", ["svd", "randomized"])
def test_powersgd_plus_escapes(refresh):
    """A refresh of the subspace every 10 steps finds the largest part that was not sent."""
    assert distance(f"powersgd_plus(rank=1, refresh_period=10, refresh={refresh!r}) + residual") < 1e-2
