"""Defines the array protocol: what an algorithm may do with arrays, so that it is written once for every tensor library.

Arrays are the library's own (numpy.ndarray, torch.Tensor on a device). Both already share arithmetic operators, comparisons,
`reshape`, `.T`, `@`, slicing, `x[indices]` and `x[indices] = values`, which parts use directly; everything that the libraries
spell differently, or that is worth a compiled kernel, is a method here. Unless stated otherwise arrays are 1-D and contiguous;
"float" means float32, or float64 if the gradient is float64 and the compressor sends it as it is.

Integers are int64 in every library (`codes`, `indices`); wire integers are uint8 only. bfloat16 travels as 2 bytes per element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import PayloadError
from .field import FLOAT32_MAX
from .rng import Key, settled
from .tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np

Array = Any
#: The answer to a question about values: a bool; from operations that defer, also a bool array of one element on the device.
Flag = Any


class Feedback(NamedTuple):
    """Defines what is compressed: p = beta residual + gamma grad; or p = grad, if the residual is None. `spent`: with a residual, the
    gradient's memory is for the result, and may be overwritten at once: by p itself or, while it is in the cache, by zeros for a result
    that is mostly zeros (see Zeros)."""

    residual: Array | None
    beta: float = 1.0
    gamma: float = 1.0
    spent: bool = False


class Zeros(NamedTuple):
    """Marks an array that holds only zeros, and to which a result may be written."""

    array: Array


def split(x: Array, ends: np.ndarray) -> list[Array]:
    """Returns the tensors that end there, as views."""
    return [x[start:end] for start, end in pairwise([0, *ends.tolist()])]


class Ops(ABC):
    """Implements the array protocol for one tensor library (and device)."""

    #: Compiled loops (arrays/kernels), by name, for parts that have a fast path; None if there are none.
    kernels: Any = None
    #: Whether answers about values stay on the device until `judged` reads them all at once, so that the host need not wait for each.
    defers: bool = False

    # --- what is looked at later ------------------------------------------------------------------------------------
    def deferring(self) -> Ops:
        """Returns operations for one driver, which may put off to `judged` what the host would have to wait for a device for."""
        return self

    def require(self, holds: Flag, otherwise: str | Callable[[], object]) -> None:
        """Raises PayloadError with this text, or what a function returns, which may raise one itself, unless the flag holds. If it is put
        off, what is computed until then must not fail whatever the payload holds."""
        if not holds:
            raise PayloadError(str(otherwise() if callable(otherwise) else otherwise))

    def judged(self, flags: Sequence[Flag]) -> list[bool]:
        """Returns the flags as bools. Raises what a requirement that was put off says, if one does not hold."""
        return [bool(flag) for flag in flags]

    def forget(self) -> None:  # noqa: B027
        """Forgets the requirements that were put off."""

    def kept_if(self, flag: Flag, x: Array) -> Array:
        """Returns x if the flag holds, else zeros."""
        return x if flag else self.zeros(len(x), "float64" if x.itemsize == 8 else "float32")

    def within(self, positions: Array, size: int) -> Array:
        """Returns the positions, which are below `size` if the payload is valid. Operations that defer bring others there, so that nobody
        reads or writes at a place that does not exist."""
        return positions

    # --- the border to the user's tensors ---------------------------------------------------------------------------
    @abstractmethod
    def describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        """Returns (shape, dtype name) of a user's tensor."""

    @abstractmethod
    def ingest(self, tensor: Any) -> Array:
        """Returns the elements as a flat float array: float64 stays, everything else becomes float32. May be a view: it is not kept."""

    @abstractmethod
    def emit(self, array: Array, spec: TensorSpec) -> Any:
        """Returns a user's tensor of spec's shape and dtype, made from a flat float array."""

    def overwrite(self, tensor: Any, array: Array, spec: TensorSpec) -> bool:
        """Writes what `emit` would return over the user's tensor. Returns False if that cannot be done."""
        return False

    def overwrite_all(self, pairs: Sequence[tuple[Any, Any]]) -> None:  # noqa: B027
        """Writes what `emit` returned, the second of each pair, over the user's tensor, the first. For operations that defer."""

    def compiles(self, x: Array) -> bool:
        """Whether `kernels` take this array."""
        return False

    # --- making and moving ------------------------------------------------------------------------------------------
    @abstractmethod
    def zeros(self, size: int, dtype: str = "float32") -> Array: ...

    def recycle(self, arrays: list[Array]) -> None:
        """Takes back, for later use, those of these arrays that nobody else refers to, and empties the list."""
        arrays.clear()

    @abstractmethod
    def upload(self, array: np.ndarray) -> Array:
        """Returns a host array as this library's, on its device."""

    def upload_once(self, array: np.ndarray) -> Array:
        """Returns what `upload` does, for an array that the caller keeps and never changes: the next time it is there already."""
        return self.upload(array)

    @abstractmethod
    def host(self, array: Array) -> np.ndarray:
        """Returns the array as numpy's, a view if that is possible."""

    @abstractmethod
    def concat(self, arrays: Sequence[Array]) -> Array:
        """Concatenates into a new array, even if there is only one: the result never shares memory with its parts."""

    @abstractmethod
    def full_nan(self, size: int) -> Array: ...

    # --- dtypes and bytes -------------------------------------------------------------------------------------------
    @abstractmethod
    def cast(self, x: Array, dtype: str) -> Array:
        """Converts float32 <-> float64. Returns the array itself if it has that dtype."""

    @abstractmethod
    def to_bytes(self, x: Array, dtype: str) -> Array:
        """Returns a uint8 array, little-endian, of floats rounded once, to nearest even, to `dtype`; float16 saturates at +-65504, bfloat16
        and float32 at their largest finite value. NaN stays NaN. Integer dtypes take int64 in their range."""

    @abstractmethod
    def from_bytes(self, data: Array, dtype: str) -> Array:
        """Inverts `to_bytes`: returns floats (float32, or float64 for 'float64') or int64 (for 'int8', 'int16', 'int32') from uint8."""

    @abstractmethod
    def float_bits(self, x: Array) -> Array:
        """Returns int64: the 32 bits of each float32, as an unsigned number."""

    @abstractmethod
    def bits_float(self, bits: Array) -> Array:
        """Inverts `float_bits`: returns float32 from int64 in [0, 2**32)."""

    @abstractmethod
    def as_int(self, x: Array) -> Array:
        """Returns int64 of floats that are whole numbers, or of booleans."""

    def clamped(self, x: Array) -> Array:
        """Returns x, with the largest number of float32 in place of magnitudes above it; NaN stays NaN."""
        return self.where(x > FLOAT32_MAX, FLOAT32_MAX, self.where(x < -FLOAT32_MAX, -FLOAT32_MAX, x))

    def saturated(self, x: Array) -> Array:
        """Returns `clamped` as float32; x may be overwritten."""
        return x if self.all_finite(x) else self.cast(self.clamped(x), "float32")

    def to_odd(self, x: Array) -> Array:
        """Returns float32, of finite float64 in its range: what lies between two float32 becomes the one whose last bit is 1. If that is
        rounded to 16 bits, the result is that of one rounding; from the nearest float32, a tie could be made of what is none."""
        nearest = self.cast(x, "float32")
        bits, back = self.float_bits(nearest), self.cast(nearest, "float64")
        away = self.as_int(abs(x) > abs(back)) * 2 - 1
        return self.bits_float(self.where((back != x) & (bits % 2 == 0), bits + away, bits))

    def mean_of_wire(self, pieces: Sequence[Array], dtype: str, divisor: int) -> Array:
        """Returns uint8: the wire form of the mean of floats in wire form, added in this order in float32 (or wider), divided, and rounded
        once."""
        total = self.from_bytes(pieces[0], dtype)
        for piece in pieces[1:]:
            total = total + self.from_bytes(piece, dtype)
        return self.to_bytes(total / self.number(divisor), dtype)

    # --- questions about values -------------------------------------------------------------------------------------
    @abstractmethod
    def all_finite(self, x: Array) -> Flag: ...

    @abstractmethod
    def any_nonzero(self, x: Array) -> bool: ...

    @abstractmethod
    def block_norms(self, x: Array, block: int, order: float) -> Array:
        """Returns float64[ceil(d / block)]: the 1-, 2- or infinity-norm of each block (the last may be shorter), in float64, summed in the
        order of arrays/sums.py."""

    @abstractmethod
    def top_k(self, x: Array, k: int) -> Array:
        """Returns int64[k], ascending: the positions of the k largest |x|; among equals the lowest positions."""

    def largest_each(self, x: Array, ends: np.ndarray, counts: np.ndarray) -> Array:
        """Returns int64, ascending: the positions that `top_k` finds of each of the tensors that end there."""
        pieces = zip(ends.tolist(), split(x, ends), counts.tolist(), strict=True)
        return self.concat([end - len(piece) + self.top_k(piece, count) for end, piece, count in pieces])

    @abstractmethod
    def top_k_each(self, x: Array, block: int, k: int) -> Array:
        """Returns int64, ascending: the positions in x, a whole number of blocks, of the k largest |x| of each block; equals as in
        `top_k`."""

    @abstractmethod
    def at_least(self, x: Array, threshold: float) -> Array:
        """Returns int64[m], ascending: the positions with |x| >= threshold and x != 0."""

    @abstractmethod
    def sums_of_rows(self, rows: Array) -> Array:
        """Returns float64[m]: the sum of each row of float64[m, n], which may be overwritten, in the order of arrays/sums.py."""

    def sums_of_each(self, x: Array, ends: np.ndarray) -> Array:
        """Returns float64: the sum of the magnitudes of each of the tensors that end there, as `block_norms` of a tensor of one block."""
        return self.concat([self.block_norms(piece, len(piece), 1) for piece in split(x, ends)])

    def owners(self, ends: np.ndarray, size: int) -> Array:
        """Returns int64[size]: the number of the tensor, of those that end there, to which each place belongs."""
        return self.rank_among(self.upload(ends), self.arange(size))

    @abstractmethod
    def total(self, x: Array) -> float:
        """Returns the sum, in float64, in the order of arrays/sums.py."""

    @abstractmethod
    def largest(self, x: Array) -> float:
        """Returns max |x|, 0 if x is empty."""

    @abstractmethod
    def where(self, mask: Array, a: Any, b: Any) -> Array:
        """Returns a where the mask holds, else b. These are arrays, or Python numbers if the other is an array."""

    @abstractmethod
    def positions(self, mask: Array) -> Array:
        """Returns int64, ascending: the positions where the mask holds."""

    @abstractmethod
    def cumsum(self, x: Array) -> Array:
        """Returns int64: the running sums of int64."""

    @abstractmethod
    def sort(self, x: Array) -> Array:
        """Returns a new array, ascending."""

    @abstractmethod
    def search(self, edges: np.ndarray, x: Array) -> Array:
        """Returns int64: how many of these ascending edges (float32, on the host) are <= x_j."""

    @abstractmethod
    def rank_among(self, ascending: Array, x: Array) -> Array:
        """Returns int64: how many elements of `ascending` (of x's dtype) are <= x_j."""

    @abstractmethod
    def sums_by_code(self, codes: Array, x: Array, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (float64[count]: the sums of the x_j whose code is c; int64[count]: how many), on the host; adds in order of j."""

    # --- elementwise ------------------------------------------------------------------------------------------------
    @abstractmethod
    def copy(self, x: Array) -> Array: ...

    @abstractmethod
    def sign(self, x: Array) -> Array: ...

    @abstractmethod
    def log(self, x: Array) -> Array:
        """Returns float64: the natural logarithms of positive floats."""

    @abstractmethod
    def floor(self, x: Array) -> Array: ...

    @abstractmethod
    def rint(self, x: Array) -> Array:
        """Rounds to the nearest whole number, ties to even. The result is still floats."""

    @abstractmethod
    def random_words(self, key: Key, count: int) -> Array:
        """Returns int64[count] in [0, 2**32): the stream of rng.words."""

    @abstractmethod
    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        """Returns x with its axes in this order; contiguous."""

    @abstractmethod
    def spread(self, per_block: Array, block: int, size: int, dtype: str = "float32") -> Array:
        """Returns float32[size] (or float64): element j is per_block[j // block]. per_block: may be on the host."""

    def drawn(self, chances: Array, key: Key) -> Array:
        """Returns bools that hold with these chances, float32 or float64, exactly. The draw for element j is (word j of the stream) >> 8,
        compared with the chance times 2**24; if that lies between the draw and the next one, rng.settled decides."""
        expected, draws = chances * 2.0**24, self.cast(self.random_words(key, len(chances)) >> 8, "float32")
        holds = draws < expected
        tied = self.positions(holds & (draws + 1 > expected))
        if len(tied):
            rest = self.cast(expected[tied], "float64") - self.cast(draws[tied], "float64")
            holds[tied] = self.upload(settled(key, self.host(tied), self.host(rest)))
        return holds

    def round_randomly(self, x: Array, scale: Array, levels: int, key: Key) -> Array:
        """Returns int64 codes: |x| * scale, in float32, rounded down or up at random in proportion to the fraction, at most `levels`."""
        scaled = abs(x) * scale
        low = self.floor(scaled)
        codes = self.as_int(low) + self.as_int(self.drawn(scaled - low, key))
        return self.where(codes > levels, levels, codes)

    def number(self, value: float) -> Any:
        """Returns the number in a form that divides an array, or is divided by one, with one rounding. With a Python number torch would
        multiply by an inverse."""
        return value

    def product(self, a: Array, b: Array) -> Array:
        """Returns the elements of the matrix a @ b, the same bits in every library and on every processor: 0, plus the first column of a
        times the first row of b, plus the second, and so on; products and sums are rounded. For what all ranks compute alike."""
        total = self.zeros(len(a) * b.shape[1], "float64" if a.itemsize == 8 else "float32").reshape(len(a), -1)
        for r in range(len(b)):
            total += a[:, r : r + 1] * b[r]
        return total.reshape(-1)

    def multiply(self, a: Array, b: Array) -> Array:
        """Returns the matrix a @ b in the full precision of its dtype, whatever the user allows elsewhere. Libraries add in orders of their
        own: it is for what a rank computes of its own gradient."""
        return a @ b

    def project(self, a: Array, x: Array) -> Array:
        """Returns a^T M: float[columns of a, columns of M], as `multiply` does. M is the elements x as a matrix with as many rows as a."""
        return self.multiply(a.T, x.reshape(len(a), -1))

    def subtract_product(self, x: Array, a: Array, b: Array) -> None:
        """Subtracts in place: x -= product(a, b)."""
        x -= self.product(a, b)

    def sum_up(self, feedback: Feedback, grad: Array) -> Array:
        """Returns beta residual + gamma grad, for a feedback that has a residual, as a new array, finite or not."""
        assert feedback.residual is not None
        residual = feedback.residual if feedback.beta == 1 else feedback.residual * feedback.beta
        return residual + (grad if feedback.gamma == 1 else grad * feedback.gamma)

    def norm(self, x: Array) -> float:
        """Returns ||x||, summed in float64; 0 if x is empty."""
        return float(self.block_norms(x, len(x), 2)[0]) if len(x) else 0.0

    # --- bits -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def pack(self, codes: Array, width: int) -> Array:
        """Returns uint8[ceil(n * width / 8)]: n codes of `width` bits (1..32), lowest bit first, the last byte padded with zero bits."""

    @abstractmethod
    def unpack(self, data: Array, width: int, count: int) -> Array:
        """Inverts `pack`: returns int64[count]."""

    @abstractmethod
    def pack_signs(self, x: Array) -> Array:
        """Returns pack(x >= 0, 1)."""

    @abstractmethod
    def unpack_signs(self, data: Array, count: int) -> Array:
        """Inverts `pack_signs`: returns float32[count] of +1 and -1."""

    @abstractmethod
    def set_bits(self, positions: Array, bits: int) -> Array:
        """Returns uint8[ceil(bits / 8)] with ones at these positions."""

    @abstractmethod
    def bit_positions(self, data: Array) -> Array:
        """Returns int64: the positions of the ones, ascending."""

    def ones_of(self, data: Array, count: int) -> tuple[Array, Flag]:
        """Returns `bit_positions` and whether they are `count`. Operations that defer return int64[count], whatever the bits are."""
        found = self.bit_positions(data)
        return found, len(found) == count

    @abstractmethod
    def arange(self, count: int) -> Array:
        """Returns int64[count]: 0, 1, ..."""
