"""Adds up floats in one order, which all libraries and kernels share: a sum has the same bits everywhere, at a tie between two floats, too.

Float64 elements of a block are cut into pieces of PIECE, the last one filled up with zeros; a shorter block is one piece. In each piece the
upper half is added to the lower half, and so on until one number is left (`fold`); a middle element waits for the next turn. The sums of
the pieces are added one after the other. If a tensor's last block is shorter than the others, it is filled up with zeros first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

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


@lru_cache
def lanes(width: int) -> np.ndarray:
    """Returns int64[2**m]: the element of a row of this width that must be at each place of a row of the next power of two, so that both
    fold to the same bits; -1 for a zero."""
    if width == 1:
        return np.zeros(1, np.int64)
    half = width // 2
    lower = lanes(width - half)
    return np.concatenate([lower, np.where((lower >= 0) & (lower < half), lower + width - half, -1)])


class Pieces(NamedTuple):
    """Says how the pieces of several tensors, laid end to end, are summed at once.

    long: the tensors, as slices, that fill whole pieces with zeros behind. places: int64[shorter tensors, PIECE]: what of the array is in
    the only piece of each; -1 for a zero. at: int64: where each piece's sum goes in a matrix with `most` columns, one row per tensor; the
    pieces of long tensors come first."""

    long: list[slice]
    places: np.ndarray
    at: np.ndarray
    most: int


@lru_cache(maxsize=256)
def pieces_of(ends: tuple[int, ...]) -> Pieces:
    """Returns how the pieces of the tensors that end there are summed."""
    tensors = [slice(start, end) for start, end in pairwise([0, *ends])]
    counts = [-(-(here.stop - here.start) // PIECE) for here in tensors]
    most, long = max(counts), []
    first: list[int] = []
    last: list[int] = []
    places = np.full((sum(here.stop - here.start < PIECE for here in tensors), PIECE), -1)
    for number, (here, count) in enumerate(zip(tensors, counts, strict=True)):
        if here.stop - here.start < PIECE:
            inside = lanes(here.stop - here.start)
            places[len(last), : len(inside)] = np.where(inside < 0, -1, here.start + inside)
            last.append(number * most)
        else:
            long.append(here)
            first += range(number * most, number * most + count)
    return Pieces(long, places, np.array(first + last), most)


def dots(rows: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Returns the product of float64[m, n] and float64[n]. The products of elements are rounded."""
    products = np.zeros((len(rows), _filled(len(column))))
    np.multiply(rows, column, out=products[:, : len(column)])
    return row_sums(products)


def _filled(block: int) -> int:
    """Returns the elements of a block with the zeros that fill it up."""
    return block if block <= PIECE else -(-block // PIECE) * PIECE
