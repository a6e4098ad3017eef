"""Index coding: k ascending positions of d, in a number of bytes that depends on k and d alone.

Elias-Fano: the low b bits of every position, packed, and the high parts in unary as a bitmap of k + (d - 1 >> b) bits. With the
best b it takes about log2(d / k) + 2 bits a position (8.6 at 1%; Golomb-Rice, whose size varies, 8.1), is a fixed size, and
is encoded and decoded by array operations without a loop. Where a plain bitmap of d bits is smaller, it is used; where k = d,
nothing is sent.
"""

from __future__ import annotations

from .errors import PayloadError
from .ops import Array, Ops

BITMAP = -1


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _low_bits(k: int, d: int) -> int:
    """The number of low bits that makes the code smallest, or BITMAP."""
    best = max(0, (d // k).bit_length() - 1)
    candidates = [b for b in (best - 1, best, best + 1) if 0 <= b <= 31]
    choice = min(candidates, key=lambda b: (_elias_fano_bytes(k, d, b), b))
    return choice if _elias_fano_bytes(k, d, choice) < _bytes(d) else BITMAP


def _elias_fano_bytes(k: int, d: int, low: int) -> int:
    return _bytes(k * low) + _bytes(k + (d - 1 >> low))


def index_bytes(k: int, d: int) -> int:
    """Bytes that k positions of d take."""
    if k == 0 or k == d:
        return 0
    low = _low_bits(k, d)
    return _bytes(d) if low == BITMAP else _elias_fano_bytes(k, d, low)


def max_index_bytes(d: int) -> int:
    """The most that any number of positions of d takes: never more than a bitmap."""
    return _bytes(d)


def encode_indices(ops: Ops, positions: Array, d: int) -> Array:
    """uint8[index_bytes(k, d)] for int64[k], ascending and distinct."""
    k = len(positions)
    if k == 0 or k == d:
        return ops.set_bits(positions[:0], 0)
    low = _low_bits(k, d)
    if low == BITMAP:
        return ops.set_bits(positions, d)
    high = ops.set_bits((positions >> low) + ops.arange(k), k + (d - 1 >> low))
    return ops.concat([ops.pack(positions & ((1 << low) - 1), low), high]) if low else high


def decode_indices(ops: Ops, data: Array, k: int, d: int) -> Array:
    """int64[k], ascending, distinct and in [0, d), whatever the bytes are; else PayloadError."""
    if len(data) != index_bytes(k, d):
        raise PayloadError(f"has {len(data)} bytes of indices where {k} of {d} take {index_bytes(k, d)}")
    if k == 0 or k == d:
        return ops.arange(k)
    low = _low_bits(k, d)
    low_bytes = 0 if low == BITMAP else _bytes(k * low)
    positions = ops.bit_positions(data[low_bytes:])
    if len(positions) != k:
        raise PayloadError(f"marks {len(positions)} indices, not {k}")
    if low != BITMAP:
        positions = positions - ops.arange(k) << low
        if low:
            positions = positions | ops.unpack(data[:low_bytes], low, k)
        if k > 1 and not bool((positions[1:] > positions[:-1]).all()):
            raise PayloadError("has indices out of order")
    if int(positions[-1]) >= d:
        raise PayloadError(f"has index {int(positions[-1])}, out of range for {d} elements")
    return positions
