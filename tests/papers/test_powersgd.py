"""PowerSGD can stall for ever, and PowerSGD+ does not: a construction with exact gradients (Xie, Chen, Yuan 2025)."""

from __future__ import annotations

import pytest

from grace_ext.papers.counterexample import distances


def test_powersgd_never_sees_what_is_orthogonal_to_its_subspace():
    """The residual stays diagonal, so M Q stays parallel to the first axis: entries 2 and 3 never move, in spite of error feedback."""
    assert distances("powersgd(rank=1) + residual", 2000, 0.0)[-1] == pytest.approx(13**0.5, abs=1e-4)


@pytest.mark.parametrize("refresh", ["svd", "randomized", "gram"])
def test_powersgd_plus_escapes(refresh):
    """A refresh of the subspace every 10 steps finds the largest part that was not sent."""
    assert distances(f"powersgd_plus(rank=1, refresh_period=10, refresh={refresh!r}) + residual", 2000, 0.0)[-1] < 1e-2
