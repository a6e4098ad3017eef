"""Computes epsilon with the package dp-accounting, by privacy loss distributions (PLD), whose bound is tighter than Renyi's."""

from __future__ import annotations

import math
from typing import Any

from ..errors import ParameterError, UnsupportedError, shown


def _library() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld  # noqa: F401 (makes dp_accounting.pld an attribute)
    except ImportError as error:
        raise UnsupportedError(f"epsilon is computed by dp-accounting: pip install 'grace_ext[privacy]' ({error})") from error
    return dp_accounting


def _check(name: str, value: Any, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < high:
        raise ParameterError(f"{name} must be a number above 0 and below {high:g}, got {shown(value)}")
    return float(value)


def _check_steps(steps: Any) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ParameterError(f"steps must be a whole number, at least 0, got {shown(steps)}")
    return steps


def epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Returns an upper bound of epsilon after these steps, for neighbours of which one lacks one unit. Infinity without noise."""
    _check("delta", delta, 1)
    if not _check_steps(steps):
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    library = _library()
    event = library.dp_event.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        event = library.dp_event.PoissonSampledDpEvent(sample_rate, event)
    accountant = library.pld.PLDAccountant()
    accountant.compose(library.dp_event.SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(delta))


def noise_for(wanted: float, sample_rate: float, steps: int, delta: float, tolerance: float = 1e-3) -> float:
    """Returns a noise multiplier with which epsilon stays below `wanted`; the smallest one is lower by at most `tolerance`."""
    _check("epsilon", wanted, math.inf)
    if not _check_steps(steps):
        raise ParameterError("steps must be at least 1: without a step nothing needs noise")
    low, high = 0.0, 1.0
    while epsilon(high, sample_rate, steps, delta) > wanted:
        low, high = high, 2 * high
        if high > 1e6:
            raise ParameterError(f"no noise multiplier up to 1e6 gives epsilon {wanted:g} at delta {delta:g} after {steps} steps")
    while high - low > tolerance:
        middle = (low + high) / 2
        # Below 0.1 the accountant's tables grow without bound, and epsilon is in the hundreds.
        if middle < 0.1 or epsilon(middle, sample_rate, steps, delta) > wanted:
            low = middle
        else:
            high = middle
    return high
