"""Implements the array protocol in numpy: the reference that every other implementation equals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..parts import rng
from ..parts.field import FLOAT32_MAX, HALVES, INTEGERS
from ..parts.ops import Ops
from ..parts.tensor import TensorSpec
from . import sums

# Bit matrices take `width` bytes per code while they are built; in pieces they stay in the cache. A multiple of 8 codes.
BITS_PIECE = 1 << 15
# Elements of a product that are computed at a time; they stay in the cache while products are added to them.
PRODUCT_PIECE = 1 << 15
# The largest finite value of each dtype, exact in float32 (and in float64).
LARGEST: dict[Any, float] = {
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": FLOAT32_MAX,
    "float64": float(np.finfo(np.float64).max),
}
LARGEST |= {np.dtype(name): LARGEST[name] for name in ("float16", "float32", "float64")}


class NumpyOps(Ops):
    """Works on numpy arrays on the host. It has no state."""

    def describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        array = np.asarray(tensor)
        return array.shape, array.dtype.name

    def ingest(self, tensor: Any) -> np.ndarray:
        array = np.asarray(tensor)
        dtype = np.float64 if array.dtype.name == "float64" else np.float32  # by name, which is the same for both byte orders
        return np.ascontiguousarray(array, dtype=dtype).reshape(-1)

    def emit(self, array: np.ndarray, spec: TensorSpec) -> Any:
        if spec.dtype in HALVES:
            return self.to_bytes(array, spec.dtype).view(numpy_dtype(spec.dtype)).reshape(spec.shape)
        return saturated(array, spec.dtype).astype(spec.dtype, copy=False).reshape(spec.shape)

    def zeros(self, size: int, dtype: str = "float32") -> np.ndarray:
        return np.zeros(size, dtype)

    def upload(self, array: np.ndarray) -> np.ndarray:
        return array

    def host(self, array: np.ndarray) -> np.ndarray:
        return array

    def concat(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays)

    def full_nan(self, size: int) -> np.ndarray:
        return np.full(size, np.nan, np.float32)

    def cast(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if x.dtype == dtype:
            return x
        with np.errstate(over="ignore"):  # all_finite finds what overflows
            return x.astype(dtype, copy=False)

    def to_bytes(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "float64" or dtype in INTEGERS:
            return np.ascontiguousarray(x, dtype).view(np.uint8)
        x = saturated(x, dtype)
        if dtype in HALVES and x.dtype == np.float64:
            x = self.to_odd(x)
        if dtype == "bfloat16":
            return _bfloat16_bits(x).view(np.uint8)
        return np.ascontiguousarray(x, dtype).view(np.uint8)

    def from_bytes(self, data: np.ndarray, dtype: str) -> np.ndarray:
        x = typed(data, "uint16" if dtype == "bfloat16" else dtype)
        if dtype == "bfloat16":
            return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if dtype in INTEGERS:
            return x.astype(np.int64)
        return x.astype(np.float32) if dtype == "float16" else x

    def float_bits(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)

    def bits_float(self, bits: np.ndarray) -> np.ndarray:
        return bits.astype(np.uint32).view(np.float32)

    def as_int(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.int64)

    def all_finite(self, x: np.ndarray) -> bool:
        return bool(np.isfinite(x).all())

    def any_nonzero(self, x: np.ndarray) -> bool:
        return bool(x.any())

    def block_norms(self, x: np.ndarray, block: int, order: float) -> np.ndarray:
        if not x.size:
            return np.zeros(0)
        if order == np.inf:
            return np.maximum.reduceat(np.abs(x), np.arange(0, x.size, block)).astype(np.float64)
        rows = sums.in_blocks(self, x, min(block, x.size))
        (np.abs if order == 1 else np.square)(rows, out=rows)
        found = sums.row_sums(rows)
        return found if order == 1 else np.sqrt(found)

    def top_k(self, x: np.ndarray, k: int) -> np.ndarray:
        if k >= x.size:
            return np.arange(x.size)
        magnitude = np.abs(x)
        smallest = np.partition(magnitude, x.size - k)[x.size - k]
        keep = magnitude > smallest
        equal = np.flatnonzero(magnitude == smallest)
        keep[equal[: k - np.count_nonzero(keep)]] = True
        return np.flatnonzero(keep)

    def top_k_each(self, x: np.ndarray, block: int, k: int) -> np.ndarray:
        magnitude = np.abs(x).reshape(-1, block)
        smallest = np.partition(magnitude, block - k, axis=1)[:, block - k, None]
        keep, equal = magnitude > smallest, magnitude == smallest
        keep |= equal & (np.cumsum(equal, axis=1) <= k - keep.sum(axis=1, keepdims=True))
        return np.flatnonzero(keep)

    def at_least(self, x: np.ndarray, threshold: float) -> np.ndarray:
        return np.flatnonzero((np.abs(x) >= np.float32(threshold)) & (x != 0))

    def sums_of_rows(self, rows: np.ndarray) -> np.ndarray:
        return sums.row_sums(sums.filled(self, rows))

    def total(self, x: np.ndarray) -> float:
        return float(sums.row_sums(sums.in_blocks(self, x, x.size))[0]) if x.size else 0.0

    def largest(self, x: np.ndarray) -> float:
        return float(np.abs(x).max()) if x.size else 0.0

    def where(self, mask: np.ndarray, a: Any, b: Any) -> np.ndarray:
        return np.where(mask, a, b)

    def positions(self, mask: np.ndarray) -> np.ndarray:
        return np.flatnonzero(mask)

    def cumsum(self, x: np.ndarray) -> np.ndarray:
        return np.cumsum(x)

    def sort(self, x: np.ndarray) -> np.ndarray:
        return np.sort(x)

    def search(self, edges: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.searchsorted(edges.astype(np.float32), x, side="right")

    def rank_among(self, ascending: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.searchsorted(ascending, x, side="right")

    def sums_by_code(self, codes: np.ndarray, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.bincount(codes, weights=x, minlength=count), np.bincount(codes, minlength=count)

    def copy(self, x: np.ndarray) -> np.ndarray:
        return x.astype(native(x.dtype), order="C")

    def sign(self, x: np.ndarray) -> np.ndarray:
        return np.sign(x)

    def log(self, x: np.ndarray) -> np.ndarray:
        return np.log(x, dtype=np.float64)

    def floor(self, x: np.ndarray) -> np.ndarray:
        return np.floor(x)

    def rint(self, x: np.ndarray) -> np.ndarray:
        return np.rint(x)

    def random_words(self, key: rng.Key, count: int) -> np.ndarray:
        return rng.words(key, count).astype(np.int64)

    def transpose(self, x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(x.transpose(axes))

    def spread(self, per_block: np.ndarray, block: int, size: int, dtype: str = "float32") -> np.ndarray:
        if len(per_block) == 1:
            return np.full(size, per_block[0], dtype)
        return np.repeat(per_block.astype(dtype), block)[:size]

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        step, pieces = max(1, PRODUCT_PIECE // b.shape[1]), []
        for i in range(0, len(a), step):
            pieces.append(super().product(a[i : i + step], b))
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def pack(self, codes: np.ndarray, width: int) -> np.ndarray:
        if width in (8, 16, 32):
            return codes.astype(f"<u{width // 8}").view(np.uint8)
        shifts = np.arange(width, dtype=np.uint32)
        pieces = [
            np.packbits((codes[i : i + BITS_PIECE, None].astype(np.uint32) >> shifts).astype(np.uint8) & 1, bitorder="little")
            for i in range(0, codes.size, BITS_PIECE)
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)

    def unpack(self, data: np.ndarray, width: int, count: int) -> np.ndarray:
        if width in (8, 16, 32):
            return np.ascontiguousarray(data).view(f"<u{width // 8}")[:count].astype(np.int64)
        codes = np.empty(count, np.int64)
        weights = (1 << np.arange(width, dtype=np.int64)).astype(np.float64)  # exact below 2**53, and matmul is fast
        for i in range(0, count, BITS_PIECE):
            n = min(BITS_PIECE, count - i)
            bits = np.unpackbits(data[i * width // 8 :], count=n * width, bitorder="little").reshape(n, width)
            codes[i : i + n] = bits @ weights
        return codes

    def pack_signs(self, x: np.ndarray) -> np.ndarray:
        return np.packbits(x >= 0, bitorder="little")

    def unpack_signs(self, data: np.ndarray, count: int) -> np.ndarray:
        return np.unpackbits(data, count=count, bitorder="little").astype(np.float32) * 2 - 1

    def set_bits(self, positions: np.ndarray, bits: int) -> np.ndarray:
        marked = np.zeros(bits, np.bool_)
        marked[positions] = True
        return np.packbits(marked, bitorder="little")

    def bit_positions(self, data: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.unpackbits(data, bitorder="little"))

    def arange(self, count: int) -> np.ndarray:
        return np.arange(count)


def native(dtype: np.dtype) -> np.dtype:
    """Returns the same dtype in this machine's byte order. Arrays from netCDF, FITS or HDF5 files often have the other one ('>f8')."""
    return dtype.newbyteorder("=")


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype of a user's own arrays: for bfloat16 that of ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def typed(data: np.ndarray, dtype: str) -> np.ndarray:
    """Returns bytes as this dtype: a view, or a copy if they are not aligned for it, as slices of a message may be."""
    x = np.ascontiguousarray(data).view(dtype)
    return x if x.flags.aligned else data.copy().view(dtype)


def saturated(x: np.ndarray, dtype: str) -> np.ndarray:
    """Returns x with finite values clipped to the range of `dtype`; Inf and NaN stay. x itself if nothing can be out of range."""
    largest = LARGEST[dtype]
    if largest >= LARGEST[x.dtype]:
        return x
    return np.where(np.isfinite(x), np.clip(x, -largest, largest), x)


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Returns uint16: the upper half of the float32 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FC0), upper).astype(np.uint16)
