"""Shared by compressors that send values at some positions and zero elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..parts import knob

if TYPE_CHECKING:
    from ..ops import Array, Ops

#: Names of the value precisions that a user chooses, and their wire dtypes.
VALUES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def values_knob():
    """How kept values travel; the rounding error of a 16-bit form stays in the residual."""
    return knob("fp32", "precision of the kept values on the wire", choices=tuple(VALUES))


def ratio_knob():
    return knob(
        0.01,
        "fraction of the elements sent; too low converges slowly or needs warm-up, too high saves little",
        above=0,
        high=1,
        headline=True,
    )


def kept(ratio: float, d: int) -> int:
    """How many of d elements a ratio keeps: at least one, rounded up."""
    return max(1, min(d, math.ceil(ratio * d - 1e-9)))


def scatter(ops: Ops, positions: Array, values: Array, d: int) -> Array:
    """float32[d] with these values at these distinct positions."""
    dense = ops.zeros(d)
    dense[positions] = values
    return dense
