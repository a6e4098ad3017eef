"""Implements the array protocol in numpy, with compiled kernels (arrays/kernels) if they are faster: for contiguous float32 on the host."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from ..parts.field import ITEMSIZE
from ..parts.ops import Feedback
from ..parts.rng import Key
from . import kernels
from .kernels.sizes import INFINITY, L1_PIECE
from .numpy import NumpyOps
from .quantizing import NOTHING, QuantizingOps, stretches

#: Below this size a partial sort of all magnitudes is faster than a threshold from a sample.
SMALL = 16384
#: The most elements of a sample, and the least distance between two of them: each is a cache miss. The threshold from a sample is so low
#: that the elements which reach it are expected to be this many standard deviations more than are wanted.
SAMPLE, SAMPLE_STEP, MARGIN = 8192, 64, 4.0
#: In elements. Buffers of collectives of at least this size are kept for the next step.
LARGE = 1 << 18
#: In elements. A smaller array is not kept: to make one costs less than to look for one.
LEAST = 4096
#: The smallest float above zero, as bits. A threshold of zero becomes this one, because zeros are never selected.
TINY = np.uint32(1)

#: (int64[m]: positions, ascending; float32[m]: the values there)
Found = tuple[np.ndarray, np.ndarray]
Host = TypeVar("Host", bound=NumpyOps)


def host_ops(border: type[Host]) -> Host:
    """Returns the operations for this border (the class for the tensors that come in and go out), compiled if there are kernels."""
    if not kernels.enabled() or kernels.load() is None:
        return border()
    bases = (CompiledOps,) if border is NumpyOps else (border, CompiledOps)
    return type("Compiled" + border.__name__, bases, {})()


class CompiledOps(QuantizingOps):
    """Equals NumpyOps bit for bit. It keeps the arrays of a state that is over, and of collectives, for the next: fresh memory costs more
    than a pass over it."""

    def __init__(self) -> None:
        self.kernels: Any = kernels.load()
        self._spare: dict[tuple[int, str], list[np.ndarray]] = {}
        # What `empty` returned: only that is taken back, so that no more is kept than was once in use at a time.
        self._own: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    # --- memory -----------------------------------------------------------------------------------------------------
    def empty(self, size: int, dtype: str = "float32") -> np.ndarray:
        if size < LEAST:
            return self.new(size, dtype)
        spare = self._spare.get((size, dtype))
        if spare:
            return spare.pop()
        array = self.new(size, dtype)
        self._own[id(array)] = array
        return array

    def new(self, size: int, dtype: str) -> np.ndarray:
        """Returns an array whose values are not set, in memory that is no other array's."""
        return np.empty(size, dtype)

    def owns(self, array: np.ndarray) -> bool:
        """Whether `empty` returned this array, and may return it again."""
        return array.size >= LEAST and self._own.get(id(array)) is array

    def recycle(self, arrays: list[np.ndarray]) -> None:
        while arrays:
            array = arrays.pop()
            # Two references: `array`, and the argument of getrefcount. A view of it would be a third.
            if self.owns(array) and sys.getrefcount(array) == 2:
                self._spare.setdefault((array.size, array.dtype.name), []).append(array)

    def zeros(self, size: int, dtype: str = "float32") -> np.ndarray:
        if dtype != "float32":
            return super().zeros(size, dtype)
        array = self.empty(size)
        array.fill(0)
        return array

    def concat(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        size, dtype = sum(array.size for array in arrays), arrays[0].dtype
        if size < LARGE or any(array.dtype != dtype for array in arrays):
            return super().concat(arrays)
        return np.concatenate(arrays, out=self.empty(size, dtype.name))

    def mean_of_wire(self, pieces: Sequence[np.ndarray], dtype: str, divisor: int) -> np.ndarray:
        item = ITEMSIZE[dtype]
        out = np.empty(pieces[0].size, np.uint8)
        for piece in stretches(out.size // item):  # the floats, twice as large, and their sums stay in the cache
            part = slice(item * piece.start, item * piece.stop)
            out[part] = super().mean_of_wire([data[part] for data in pieces], dtype, divisor)
        return out

    # --- questions about values -------------------------------------------------------------------------------------
    def all_finite(self, x: np.ndarray) -> bool:
        x = x.reshape(-1)
        return bool(self.kernels.most(x) < INFINITY) if _float32(x) else super().all_finite(x)

    def any_nonzero(self, x: np.ndarray) -> bool:
        return bool(self.kernels.most(x)) if _float32(x) else super().any_nonzero(x)

    def largest(self, x: np.ndarray) -> float:
        return float(np.uint32(self.kernels.most(x)).view(np.float32)) if _float32(x) else super().largest(x)

    def block_norms(self, x: np.ndarray, block: int, order: float) -> np.ndarray:
        if not _float32(x) or not x.size:
            return super().block_norms(x, block, order)
        norms = np.empty(-(-x.size // block))
        if order == np.inf:
            self.kernels.block_largest(x, block, norms)
            return norms
        self.kernels.block_sums(x, min(block, x.size), order == 2, norms)
        return np.sqrt(norms) if order == 2 else norms

    # --- selection --------------------------------------------------------------------------------------------------
    def compensate(self, feedback: Feedback, grad: np.ndarray) -> np.ndarray | None:
        """Returns what is compressed, or None if it is not finite: a new array, or the gradient itself if there is no residual."""
        if feedback.residual is None:
            return grad if self.all_finite(grad) else None
        total = self.empty(grad.size)
        finite = self.kernels.compensate(feedback.residual, grad, np.float32(feedback.beta), np.float32(feedback.gamma), total)
        return total if finite else None

    def sweep(self, feedback: Feedback, grad: np.ndarray, threshold: float) -> tuple[np.ndarray, Found] | None:
        """Returns, in one pass, (what is compressed, as `compensate`, but if there is a residual with zeros where something is found; where
        its magnitude reaches the threshold, and the values there). Leaves a gradient that is spent as zeros."""
        if feedback.residual is None:
            found = self._above(grad, threshold)
            return None if found is None else (grad, found)
        residual, total = feedback.residual, self.empty(grad.size)
        bits, factors = max(np.float32(threshold).view(np.uint32), TINY), (np.float32(feedback.beta), np.float32(feedback.gamma))
        spent = grad if feedback.spent else NOTHING
        run = lambda at, *out: self.kernels.sweep(residual[at:], grad[at:], *factors, bits, total[at:], *out, spent[at:])  # noqa: E731
        found = self._collected(grad.size, run)
        return None if found is None else (total, found)

    def compensate_at(self, feedback: Feedback, grad: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns (what is compressed, as `compensate`, but if there is a residual with zeros at these positions; the values there). Leaves
        a gradient that is spent as zeros."""
        if feedback.residual is None:
            return (grad, grad[positions]) if self.all_finite(grad) else None
        total, values = self.empty(grad.size), np.empty(len(positions), np.float32)
        factors = np.float32(feedback.beta), np.float32(feedback.gamma)
        spent = grad if feedback.spent else NOTHING
        finite = self.kernels.compensate_at(feedback.residual, grad, *factors, positions, total, values, spent)
        return (total, values) if finite else None

    def compensate_stats(self, feedback: Feedback, grad: np.ndarray) -> tuple[np.ndarray, float, int, float] | None:
        """Returns (what is compressed, the sum of its magnitudes, how many are not zero, the largest); None if it is not finite. Leaves a
        gradient that is spent as zeros."""
        total, sums = grad if feedback.residual is None else self.empty(grad.size), np.zeros(3)
        if feedback.residual is None:
            self.kernels.magnitude_stats(grad, sums)
        else:
            factors = np.float32(feedback.beta), np.float32(feedback.gamma)
            self.kernels.compensate_stats(feedback.residual, grad, *factors, total, sums, grad if feedback.spent else NOTHING)
        return (total, sums[0], int(sums[1]), sums[2]) if np.isfinite(sums[2]) else None

    def magnitudes_above(self, x: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
        """Returns the magnitudes that reach a threshold above zero, in order, and the least of them."""
        at, pieces, bits, least = 0, [], max(np.float32(threshold).view(np.uint32), TINY), INFINITY
        while at < x.size:
            out = np.empty(x.size // 3 + L1_PIECE, np.float32)
            found, came_to, its_least = self.kernels.gather_above(x[at:], bits, out)
            pieces.append(out[:found])
            at, least = at + came_to, min(least, its_least)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces), float(np.uint32(least).view(np.float32))

    def total_above(self, x: np.ndarray, least: float) -> float:
        """Returns the sum, in float64, of x_j - least, each in float32."""
        return self.kernels.total_above(x, np.float32(least))

    def take_out(self, feedback: Feedback, x: np.ndarray, threshold: float) -> tuple[np.ndarray, Found] | None:
        """Returns what `sweep` does, given x, what is compressed, which is finite."""
        found = self._above(x, threshold, NOTHING if feedback.residual is None else x)
        return None if found is None else (x, found)

    def _collected(self, size: int, run: Any) -> Found | None:
        """Returns what `run(start, positions, values)` finds, called again with more room until the end; None if that is Inf or NaN."""
        pieces, at, room = [], 0, size // 32 + L1_PIECE
        while at < size:
            positions, values = np.empty(room, np.int64), np.empty(room, np.float32)
            found, came_to = run(at, positions, values)
            if found < 0:
                return None
            pieces.append((positions[:found] + at if at else positions[:found], values[:found]))
            at, room = at + came_to, 2 * room
        return pieces[0] if len(pieces) == 1 else (np.concatenate([p for p, _ in pieces]), np.concatenate([v for _, v in pieces]))

    def at_least(self, x: np.ndarray, threshold: float) -> np.ndarray:
        if not _float32(x) or not x.size or threshold < 0:
            return super().at_least(x, threshold)
        found = self._above(x, threshold)
        return super().at_least(x, threshold) if found is None else found[0]

    def _above(self, x: np.ndarray, threshold: float, taken: np.ndarray = NOTHING) -> Found | None:
        """Returns where |x_j| reaches a threshold that is not below zero (zeros never do), and the values there; None if they are not
        finite. taken: x, if zeros are to be left there."""
        bits = max(np.float32(threshold).view(np.uint32), TINY)
        return self._collected(x.size, lambda at, *out: self.kernels.collect(x[at:], bits, *out, taken[at:]))

    def threshold_for(self, k: int, sample: np.ndarray, size: int) -> float:
        """Returns a magnitude that a few more than k of `size` elements are likely to reach, by a sample of their magnitudes."""
        expected = k * len(sample) / size
        wanted = int(expected + MARGIN * expected**0.5 + 1)
        return float(np.partition(sample, len(sample) - wanted)[len(sample) - wanted]) if wanted < len(sample) else 0.0

    def top_k(self, x: np.ndarray, k: int) -> np.ndarray:
        if x.size < SMALL or 4 * k > x.size or not _float32(x):  # for a large k, a threshold leaves out too few
            return super().top_k(x, k)
        found = self._above(x, self.threshold_for(k, np.abs(x[:: sample_step(x.size)]), x.size))
        if found is None or len(found[0]) < k:
            return super().top_k(x, k)
        return found[0][super().top_k(found[1], k)]

    def largest_each(self, x: np.ndarray, ends: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the positions that `top_k` finds of each of the tensors that end at `ends`, so many of each as `counts` says."""
        positions = np.empty(counts.sum(), np.int64)
        self.kernels.largest_each(x, ends, counts, positions)
        return positions

    def sweep_for(self, feedback: Feedback, grad: np.ndarray, k: int) -> tuple[np.ndarray, Found | None] | None:
        """Returns what `sweep` does, with a threshold that a few more than k elements probably reach; or (x, None) if a sort is faster."""
        if grad.size < SMALL or k >= grad.size:
            total = self.compensate(feedback, grad)
            return None if total is None else (total, None)
        sample = self.sample(feedback, grad, slice(0, None, sample_step(grad.size)))
        return self.sweep(feedback, grad, self.threshold_for(k, np.abs(sample), grad.size))

    def sample(self, feedback: Feedback, grad: np.ndarray, which: slice) -> np.ndarray:
        """Returns these elements of what is compressed."""
        if feedback.residual is None:
            return grad[which].copy()
        return np.float32(feedback.beta) * feedback.residual[which] + np.float32(feedback.gamma) * grad[which]

    def sum_up(self, feedback: Feedback, grad: np.ndarray) -> np.ndarray:
        if not _float32(grad):
            return super().sum_up(feedback, grad)
        total = self.empty(grad.size)
        self.kernels.compensate(feedback.residual, grad, np.float32(feedback.beta), np.float32(feedback.gamma), total)
        return total

    def compensate_product(self, feedback: Feedback, grad: np.ndarray, q: np.ndarray, rows: int, rank: int) -> Any:
        """Returns (what is compressed, x, in the memory of a gradient that is spent; float32[rows * rank]: the matrix x times Q, which is
        given by rows); None if x is not finite."""
        total, p = grad if feedback.spent else self.empty(grad.size), np.zeros(rows * rank, np.float32)
        factors = np.float32(feedback.beta), np.float32(feedback.gamma)
        finite = self.kernels.compensate_product(feedback.residual, grad, *factors, np.ascontiguousarray(q), rows, rank, total, p)
        return (total, p) if finite else None

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = self.empty(len(a) * b.shape[1], a.dtype.name)
        compute = self.kernels.product if a.dtype == np.float32 else self.kernels.product_wide
        compute(*(np.ascontiguousarray(factor, a.dtype).reshape(-1) for factor in (a, b)), *a.shape, out)
        return out

    def project(self, a: np.ndarray, x: np.ndarray) -> np.ndarray:
        if not (_float32(x) and a.dtype == np.float32):
            return super().project(a, x)
        rows, rank = a.shape
        sums = np.zeros(rank * (x.size // rows), np.float32)
        self.kernels.project(x, np.ascontiguousarray(a).reshape(-1), rows, rank, sums)
        return sums.reshape(rank, -1)

    def subtract_product(self, x: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        if not _float32(x):
            return super().subtract_product(x, a, b)
        self.kernels.subtract_product(x, np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1), len(a), len(b))

    # --- bits -------------------------------------------------------------------------------------------------------
    def pack(self, codes: np.ndarray, width: int) -> np.ndarray:
        if width in (8, 16, 32) or codes.dtype != np.int64 or not codes.flags.c_contiguous:
            return super().pack(codes, width)
        out = np.empty((codes.size * width + 7) // 8, np.uint8)
        self.kernels.pack(codes, width, out)
        return out

    def unpack(self, data: np.ndarray, width: int, count: int) -> np.ndarray:
        if width in (8, 16, 32):
            return super().unpack(data, width, count)
        codes = np.empty(count, np.int64)
        self.kernels.unpack(data, width, codes)
        return codes

    def pack_signs(self, x: np.ndarray) -> np.ndarray:
        if not _float32(x):
            return super().pack_signs(x)
        out = np.empty((x.size + 7) // 8, np.uint8)
        self.kernels.pack_signs(x, out)
        return out

    def unpack_signs(self, data: np.ndarray, count: int) -> np.ndarray:
        if not 0 < count <= len(data) * 8:
            return super().unpack_signs(data, count)
        signs, one = np.empty(count, np.float32), np.ones(1, np.float32)
        self.kernels.sum_signs(signs, data[: (count + 7) // 8], -one, one, count, np.float32(1))
        return signs

    def signs_of(self, x: np.ndarray) -> tuple[np.ndarray, bool] | None:
        """Returns (signs, packed; whether any element is not zero); None if x is not finite."""
        signs = np.empty((x.size + 7) // 8, np.uint8)
        most = self.kernels.pack_signs_and_most(x, signs)
        return (signs, most > 0) if most < INFINITY else None

    def compensate_signs(self, feedback: Feedback, grad: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Returns (what is compressed, its signs packed, float64[number]), for a feedback that has a residual; None if it is not finite.
        With number 1: the sum of magnitudes; with 3: that of the elements below zero, that of the others, and how many are below."""
        total, signs, sums = self.empty(grad.size), np.empty((grad.size + 7) // 8, np.uint8), np.zeros(number)
        factors = np.float32(feedback.beta), np.float32(feedback.gamma)
        finite = self.kernels.compensate_signs(feedback.residual, grad, *factors, total, signs, sums)
        return (total, signs, sums) if finite else None

    def set_bits(self, positions: np.ndarray, bits: int) -> np.ndarray:
        out = np.zeros((bits + 7) // 8, np.uint8)
        self.kernels.set_bits(positions, out)
        return out

    def bit_positions(self, data: np.ndarray) -> np.ndarray:
        out = np.empty(self.kernels.count_bits(data), np.int64)
        self.kernels.bit_positions(data, out)
        return out

    def random_words(self, key: Key, count: int) -> np.ndarray:
        out = np.empty(count, np.int64)
        self.kernels.random_words(np.uint32(key[0]), np.uint32(key[1]), out)
        return out


def sample_step(size: int) -> int:
    """Returns the distance between two elements of a sample: an odd number, so that the sample follows no row or column."""
    return max(SAMPLE_STEP, size // SAMPLE) | 1


def _float32(x: Any) -> bool:
    return x.dtype == np.float32 and x.ndim == 1 and x.flags.c_contiguous
