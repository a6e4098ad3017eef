"""Adds up floats in one order, which all libraries and kernels share: a sum has the same bits everywhere, at a tie between two floats, too.

Float64 elements of a block are cut into pieces of PIECE, the last one filled up with zeros; a shorter block is one piece. In each piece the
upper half is added to the lower half, and so on until one number is left (`fold`); a middle element waits for the next turn. The sums of
the pieces are added one after the other. If a tensor's last block is shorter than the others, it is filled up with zeros first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .kernels.sizes import L1_PIECE

if TYPE_CHECKING:
    from ..parts.ops import Array, Ops

#: The elements of a piece. It decides bits.
PIECE = L1_PIECE


def fold(rows: Array) -> Array:
    """Returns the sum of each row of float64[m, n], n <= PIECE; overwrites them."""
    left = rows.shape[1]
    while left > 1:
        half = left // 2
        rows[:, :half] += rows[:, left - half : left]
        left -= half
    return rows[:, 0]


def in_blocks(ops: Ops, x: Array, block: int) -> Array:
    """Returns float64[ceil(d / block), n]: the blocks of x, filled up with zeros to what `row_sums` cuts into whole pieces."""
    number, whole = -(-len(x) // block), len(x) // block
    rows = ops.zeros(number * _filled(block), "float64").reshape(number, -1)
    rows[:whole, :block] = x[: whole * block].reshape(whole, block)
    rows[whole:, : len(x) - whole * block] = x[whole * block :]
    return rows


def in_order(rows: np.ndarray) -> np.ndarray:
    """Returns the sum of each row of float64[m, n], its elements added one after the other."""
    return np.add.accumulate(rows, axis=1)[:, -1]


def row_sums(rows: Array, *, add: Callable[[Array], Array] = in_order) -> Array:
    """Returns the sum of each row of float64[m, n]; overwrites them. n is PIECE at most, or a multiple of it. add: the library's form of
    `in_order`."""
    number, width = rows.shape
    return add(fold(rows.reshape(-1, min(width, PIECE))).reshape(number, -(-width // PIECE)))


def filled(ops: Ops, rows: Array) -> Array:
    """Returns the rows of float64[m, n], filled up with zeros to what `row_sums` cuts into whole pieces."""
    number, width = rows.shape
    if width == _filled(width):
        return rows
    more = ops.zeros(number * _filled(width), "float64").reshape(number, -1)
    more[:, :width] = rows
    return more


def dots(rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Returns the product of float64[m, n] and float64[n]. The products of elements are rounded."""
    products = np.zeros((len(rows), _filled(len(column))))
    np.multiply(rows, column, out=products[:, : len(column)])
    return row_sums(products)


def _filled(block: int) -> int:
    """Returns the elements of a block with the zeros that fill it up."""
    return block if block <= PIECE else -(-block // PIECE) * PIECE
