"""Quantizers that send a few floats beside their codes share this: blocks, and the check of floats that a peer sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...parts.field import FLOAT32_MAX

if TYPE_CHECKING:
    from ...parts.ops import Array, Ops


def blocks(size: int, block: int | None) -> tuple[int, int]:
    """Returns (elements per block, number of blocks). With block None, one block has all elements."""
    block = min(block or size, size)
    return block, -(-size // block)


def counts(size: int, block: int | None) -> np.ndarray:
    """Returns the number of elements of each block, as int64; the last block may be shorter."""
    block, number = blocks(size, block)
    sizes = np.full(number, block)
    sizes[-1] = size - block * (number - 1)
    return sizes


def floats_to_bytes(ops: Ops, values: Array) -> Array:
    """Returns the wire form of floats, which may be on the host: float32; values beyond its finite range saturate."""
    if isinstance(values, np.ndarray):
        return ops.upload(np.minimum(np.maximum(values, -FLOAT32_MAX), FLOAT32_MAX).astype(np.float32).view(np.uint8))
    return ops.to_bytes(values, "float32")


def floats_from_bytes(ops: Ops, data: Array, what: str, *, signed: bool = False) -> Array:
    """Returns the floats: all finite, and not negative unless `signed`. Raises PayloadError otherwise."""
    values = ops.from_bytes(data, "float32")
    right = (values >= (-FLOAT32_MAX if signed else 0)) & (values <= FLOAT32_MAX)
    ops.require(right.all(), f"has a {what} that is {'' if signed else 'negative or '}not finite")
    return values
