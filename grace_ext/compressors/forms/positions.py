"""Index coding: k ascending positions of d as bytes. Chosen by its size, or named.

    elias_fano  the low b bits of every position, packed, and the high parts in unary as a bitmap of k + (d - 1 >> b) bits. With the best b
                about log2(d / k) + 2 bits a position (8.6 at 1%), of a size that k and d alone decide
    bitmap      d bits; the smallest where k / d is above about 1/5
    golomb      Golomb-Rice: gaps, low b bits packed and the rest in unary; the smallest on average (8.1 bits at 1%), but of a size that
                varies, so that a payload cannot be gathered without an exchange of sizes on engines that need one
    packed      ceil(log2 d) bits a position
    block16     16-bit offsets in blocks of 65,536 and a 32-bit count a block
    auto        elias_fano or bitmap, whichever is smaller

All are encoded and decoded by array operations without a loop. Where k = d, nothing is sent.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ...arrays.kernels.sizes import smallest_elias_fano
from ...errors import PayloadError
from ...parts.ops import Array, Ops

CODINGS = ("auto", "elias_fano", "bitmap", "golomb", "packed", "block16")
BLOCK = 1 << 16
GOLDEN = (1 + 5**0.5) / 2


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


@lru_cache(maxsize=4096)  # a model asks for the same few sizes at every step
def _low_bits(k: int, d: int) -> int:
    """The number of low bits that makes the Elias-Fano code smallest."""
    return smallest_elias_fano(k, d)[0]


def _elias_fano_bytes(k: int, d: int, low: int) -> int:
    return _bytes(k * low) + _bytes(k + (d - 1 >> low))


def _rice_bits(k: int, d: int) -> int:
    """The remainder's bits that are best for gaps of random positions at density k / d."""
    return max(0, min(31, 1 + math.floor(math.log2(math.log(GOLDEN - 1) / math.log1p(-k / d)))))


@lru_cache(maxsize=4096)
def _coding(k: int, d: int, index: str) -> str:
    """The coding that 'auto' stands for."""
    if index != "auto":
        return index
    return "elias_fano" if _elias_fano_bytes(k, d, _low_bits(k, d)) < _bytes(d) else "bitmap"


@lru_cache(maxsize=4096)
def index_bytes(k: int, d: int, index: str = "auto") -> int:
    """Bytes that k positions of d take; for golomb, the most that they may take."""
    if k == 0 or k == d:
        return 0
    coding = _coding(k, d, index)
    if coding == "bitmap":
        return _bytes(d)
    if coding == "packed":
        return _bytes(k * (d - 1).bit_length())
    if coding == "block16":
        return 2 * k + 4 * -(-d // BLOCK)
    return _elias_fano_bytes(k, d, _low_bits(k, d) if coding == "elias_fano" else _rice_bits(k, d))


@lru_cache(maxsize=4096)
def max_index_bytes(most: int, d: int, index: str = "auto") -> int:
    """An upper bound for every number of positions up to `most`."""
    if index in ("auto", "bitmap"):
        whole = _bytes(d)
        return min(whole, index_bytes(most, d)) if index == "auto" and 0 < most < d else whole
    if index in ("packed", "block16"):
        return max(index_bytes(most, d, index), index_bytes(d - 1, d, index) if most == d and d > 1 else 0)
    # Between two powers of two the number of low bits changes by one at most.
    sizes = [1 << i for i in range(most.bit_length())]
    bounds = [_elias_fano_bytes(2 * k, d, max(0, _low_bits(k, d) - 1)) + 2 * k for k in sizes]
    return max(bounds, default=0) + (16 if d < 4 else 0)


def encode_indices(ops: Ops, positions: Array, d: int, index: str = "auto") -> Array:
    """uint8[index_bytes(k, d, index)] (at most, for golomb) for int64[k], ascending and distinct."""
    k = len(positions)
    if k == 0 or k == d:
        return ops.set_bits(positions[:0], 0)
    coding = _coding(k, d, index)
    if coding == "bitmap":
        return ops.set_bits(positions, d)
    if coding == "packed":
        return ops.pack(positions, (d - 1).bit_length())
    if coding == "block16":
        counts = np.bincount(ops.host(positions >> 16), minlength=-(-d // BLOCK)).astype("<u4").view(np.uint8)
        return ops.concat([ops.upload(counts), ops.pack(positions & (BLOCK - 1), 16)])
    if coding == "golomb":
        low = _rice_bits(k, d)
        gaps = ops.concat([positions[:1], positions[1:] - positions[:-1] - 1])
        ones = ops.cumsum(gaps >> low) + ops.arange(k)
        code, bits = gaps, int(ones[-1]) + 1
    else:
        low = _low_bits(k, d)
        if ops.kernels:
            data = np.zeros(_elias_fano_bytes(k, d, low), np.uint8)
            ops.kernels.elias_fano(positions, 0, low, data)
            return data
        ones, code, bits = (positions >> low) + ops.arange(k), positions, k + (d - 1 >> low)
    high = ops.set_bits(ones, bits)
    return ops.concat([ops.pack(code & ((1 << low) - 1), low), high]) if low else high


def decode_indices(ops: Ops, data: Array, k: int, d: int, index: str = "auto") -> Array:
    """int64[k], ascending, distinct and in [0, d), whatever the bytes are; else PayloadError."""
    if k > d:
        raise PayloadError(f"has {k} indices of {d} elements")
    expected, coding = index_bytes(k, d, index), _coding(k, d, index) if 0 < k < d else "none"
    if len(data) != expected and not (coding == "golomb" and len(data) <= expected):
        raise PayloadError(f"has {len(data)} bytes of indices where {k} of {d} take {expected}")
    if k == 0 or k == d:
        return ops.arange(k)
    if coding == "elias_fano" and ops.kernels:
        positions = np.empty(k, np.int64)
        if ops.kernels.open_elias_fano(data, _low_bits(k, d), d, positions):
            return positions
        # What is wrong with it, the plain form says.
    if coding == "packed":
        positions = ops.unpack(data, (d - 1).bit_length(), k)
    elif coding == "block16":
        positions = _decode_blocks(ops, data, k, d)
    else:
        positions = _decode_unary(ops, data, k, d, coding)
    if k > 1 and coding != "bitmap" and not bool((positions[1:] > positions[:-1]).all()):
        raise PayloadError("has indices out of order")
    if int(positions[-1]) >= d:
        raise PayloadError(f"has index {int(positions[-1])}, out of range for {d} elements")
    return positions


def _decode_blocks(ops: Ops, data: Array, k: int, d: int) -> Array:
    blocks = -(-d // BLOCK)
    counts = np.ascontiguousarray(ops.host(data[: 4 * blocks])).copy().view("<u4").astype(np.int64)
    if counts.sum() != k:
        raise PayloadError(f"has {int(counts.sum())} indices in its blocks, not {k}")
    return ops.upload(np.repeat(np.arange(blocks, dtype=np.int64) << 16, counts)) + ops.unpack(data[4 * blocks :], 16, k)


def _decode_unary(ops: Ops, data: Array, k: int, d: int, coding: str) -> Array:
    low = {"bitmap": lambda: 0, "golomb": lambda: _rice_bits(k, d), "elias_fano": lambda: _low_bits(k, d)}[coding]()
    low_bytes = _bytes(k * low)
    ones = ops.bit_positions(data[low_bytes:])
    if len(ones) != k:
        raise PayloadError(f"marks {len(ones)} indices, not {k}")
    if coding == "bitmap":
        return ones
    positions = ones - ops.arange(k)
    if coding == "golomb":
        positions = ops.concat([positions[:1], positions[1:] - positions[:-1]])
    positions = positions << low
    if low:
        positions = positions | ops.unpack(data[:low_bytes], low, k)
    return ops.cumsum(positions + 1) - 1 if coding == "golomb" else positions
