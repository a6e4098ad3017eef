"""Encodes k ascending positions of d elements as bytes. The coding is chosen by its size, or named by the user.

    elias_fano  the low b bits of every position, packed, and the high parts in unary as a bitmap of k + (d - 1 >> b) bits. With the best b
                about log2(d / k) + 2 bits per position (8.6 at 1%); the size depends only on k and d
    bitmap      d bits; the smallest if k / d is above about 1/5
    golomb      Golomb-Rice: gaps, low b bits packed and the rest in unary; the smallest on average (8.1 bits at 1%), but its size varies,
                so that engines which must know the sizes exchange them before a gather
    packed      ceil(log2 d) bits per position
    block16     16-bit offsets in blocks of 65,536 and a 32-bit count per block
    auto        elias_fano or bitmap, whichever is smaller

All are encoded and decoded by array operations without a loop. If k is 0 or d, nothing is sent.
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
    """Returns the number of low bits that makes the Elias-Fano code smallest."""
    return smallest_elias_fano(k, d)[0]


def _elias_fano_bytes(k: int, d: int, low: int) -> int:
    return _bytes(k * low) + _bytes(k + (d - 1 >> low))


def _rice_bits(k: int, d: int) -> int:
    """Returns the number of remainder bits that is best for the gaps of random positions at density k / d."""
    return max(0, min(31, 1 + math.floor(math.log2(math.log(GOLDEN - 1) / math.log1p(-k / d)))))


@lru_cache(maxsize=4096)
def _coding(k: int, d: int, index: str) -> str:
    """Returns the coding itself, or, for 'auto', the one that it stands for."""
    if index != "auto":
        return index
    return "elias_fano" if _elias_fano_bytes(k, d, _low_bits(k, d)) < _bytes(d) else "bitmap"


@lru_cache(maxsize=4096)
def index_bytes(k: int, d: int, index: str = "auto") -> int:
    """Returns the bytes that k positions of d take; for golomb, the most that they may take."""
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
    """Returns an upper bound of `index_bytes` for any number of positions up to `most`."""
    if index in ("auto", "bitmap"):
        whole = _bytes(d)
        return min(whole, index_bytes(most, d)) if index == "auto" and 0 < most < d else whole
    if index in ("packed", "block16"):
        return max(index_bytes(most, d, index), index_bytes(d - 1, d, index) if most == d and d > 1 else 0)
    # Between two powers of two the number of low bits changes by one at most.
    sizes = [1 << i for i in range(most.bit_length())]
    bounds = [_elias_fano_bytes(2 * k, d, max(0, _low_bits(k, d) - 1)) + 2 * k for k in sizes]
    return max(bounds, default=0) + (16 if d < 4 else 0)


@lru_cache(maxsize=4096)
def parts_of_code(k: int, d: int) -> tuple[int, int, int]:
    """Returns, of the coding 'auto': (the low bits of each position; what the next position adds to the bit of its high part, 1 or, in a
    bitmap, 0; the bytes of all low bits, which come first)."""
    if k in (0, d) or _coding(k, d, "auto") == "bitmap":
        return 0, 0, 0
    low = _low_bits(k, d)
    return low, 1, _bytes(k * low)


def encode_indices(ops: Ops, positions: Array, d: int, index: str = "auto") -> Array:
    """Encodes positions, int64[k], ascending and distinct, as uint8[index_bytes(k, d, index)]; for golomb, at most so many."""
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
    """Returns the positions, int64[k]: ascending, distinct and in [0, d), whatever the bytes are. Raises PayloadError otherwise."""
    if k > d:
        raise PayloadError(f"has {k} indices, more than its {d} elements")
    expected, coding = index_bytes(k, d, index), _coding(k, d, index) if 0 < k < d else "none"
    if len(data) != expected and not (coding == "golomb" and len(data) <= expected):
        raise PayloadError(f"has {len(data)} bytes of indices, but {k} of {d} take {expected}")
    if k == 0 or k == d:
        return ops.arange(k)
    if coding == "elias_fano" and ops.kernels:
        positions = np.empty(k, np.int64)
        if ops.kernels.open_elias_fano(data, _low_bits(k, d), d, positions):
            return positions
        # The code is invalid: the plain form raises the error that says why.
    if coding == "packed":
        positions = ops.unpack(data, (d - 1).bit_length(), k)
    elif coding == "block16":
        positions = _decode_blocks(ops, data, k, d)
    else:
        positions = _decode_unary(ops, data, k, d, coding)
    if k > 1 and coding != "bitmap":
        ops.require((positions[1:] > positions[:-1]).all(), "has indices that repeat or are out of order")
    last = ops.copy(positions[-1:])
    ops.require((last < d).all(), lambda: f"has index {int(last[0])}, out of range for {d} elements")
    return ops.within(positions, d)


def _decode_blocks(ops: Ops, data: Array, k: int, d: int) -> Array:
    blocks = -(-d // BLOCK)
    counts = np.ascontiguousarray(ops.host(data[: 4 * blocks])).copy().view("<u4").astype(np.int64)
    if counts.sum() != k:
        raise PayloadError(f"has {int(counts.sum())} indices in its blocks, expected {k}")
    return ops.upload(np.repeat(np.arange(blocks, dtype=np.int64) << 16, counts)) + ops.unpack(data[4 * blocks :], 16, k)


def _decode_unary(ops: Ops, data: Array, k: int, d: int, coding: str) -> Array:
    low = {"bitmap": lambda: 0, "golomb": lambda: _rice_bits(k, d), "elias_fano": lambda: _low_bits(k, d)}[coding]()
    low_bytes = _bytes(k * low)
    ones, right = ops.ones_of(data[low_bytes:], k)
    ops.require(right, f"marks another number of indices than {k}")
    if coding == "bitmap":
        return ones
    positions = ones - ops.arange(k)
    if coding == "golomb":
        positions = ops.concat([positions[:1], positions[1:] - positions[:-1]])
    positions = positions << low
    if low:
        positions = positions | ops.unpack(data[:low_bytes], low, k)
    return ops.cumsum(positions + 1) - 1 if coding == "golomb" else positions
