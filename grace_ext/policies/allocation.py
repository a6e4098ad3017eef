"""Solves L-GreCo's knapsack exactly on a grid of errors: the cheapest choice for each layer within a budget of errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: How many grid steps the budget has.
GRID = 10_000


def on_grid(errors: np.ndarray, budget: float, grid: int = GRID) -> np.ndarray:
    """Returns the errors as int64 multiples of budget / grid, rounded up, so that a sum of at most `grid` steps keeps the budget. An error
    that alone exceeds the budget, or is NaN, becomes grid + 1, which is never chosen."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.ceil(np.asarray(errors, np.float64) / (budget / grid))
    steps[np.asarray(errors) == 0] = 0
    return np.where(steps <= grid, steps, grid + 1).astype(np.int64)  # a NaN is not <= anything


def allocate(errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float, grid: int = GRID) -> list[int] | None:
    """Returns the index of each layer's choice, such that the sum of sizes is the smallest possible with

        sum over layers of on_grid(error of the choice) <= grid,

    and among solutions of the same size the sum on the grid is the smallest. None if there is no solution. errors, sizes: one list per
    layer, with one entry per choice.

    best[l][e] is the smallest size of layers 0..l with errors of at most e grid steps:
        best[l][e] = min over choices c of best[l-1][e - err(l, c)] + size(l, c),   best[-1][e] = 0.
    O(layers x choices x grid) operations on whole rows of numpy. Errors are rounded up by less than one grid step per layer, so the
    solution keeps the budget, and misses the true optimum by at most layers / grid of the budget.
    """
    best = np.zeros(grid + 1)
    picks = np.zeros((len(errors), grid + 1), np.int16)
    steps = [on_grid(np.asarray(of_layer, np.float64), budget, grid) for of_layer in errors]
    for layer, (own_steps, own_sizes) in enumerate(zip(steps, sizes, strict=True)):
        row = np.full(grid + 1, np.inf)
        # In order of ascending errors, and replaced only by a smaller size: among equal sizes the smallest error stays.
        for choice in np.argsort(own_steps, kind="stable"):
            shift = own_steps[choice]
            if shift > grid:
                break
            candidate = best[: grid + 1 - shift] + own_sizes[choice]
            better = candidate < row[shift:]
            np.copyto(row[shift:], candidate, where=better)
            picks[layer, shift:][better] = choice
        best = row
    if not np.isfinite(best[grid]):
        return None
    left = int(np.argmax(best == best[grid]))  # rows never increase: the first of that size has the smallest error
    chosen = []
    for layer in reversed(range(len(steps))):
        chosen.append(int(picks[layer, left]))
        left -= int(steps[layer][chosen[-1]])
    return chosen[::-1]
