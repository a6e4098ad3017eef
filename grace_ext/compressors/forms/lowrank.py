"""Low-rank compressors share this code: the matrix of a tensor, its starting subspace, and orthonormal columns."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from ...arrays import kernels
from ...arrays.sums import dots
from ...parts import rng
from ...parts.ops import Array, Ops
from ..base import Compressor, Observed


def orthonormalize(matrix: np.ndarray) -> np.ndarray:
    """Returns the columns, made orthonormal by two passes of Gram-Schmidt in float64, as float32: the same bits on every processor, with
    kernels and without. A column that is zero, or depends on those before it, becomes zero. Never divides by zero, whatever the input."""
    columns = np.array(matrix.T, np.float64, order="C")
    if kernels.enabled() and (compiled := kernels.load()):
        compiled.gram_schmidt(columns.reshape(-1), len(columns))
        return columns.T.astype(np.float32, order="C")
    for j, column in enumerate(columns):
        before = np.sqrt(dots(column[None], column)[0])
        for _ in range(2):
            for other, factor in zip(columns[:j], dots(columns[:j], column), strict=True):
                column -= factor * other
        norm = np.sqrt(dots(column[None], column)[0])
        column *= 1 / norm if norm > 1e-7 * before else 0.0
    return columns.T.astype(np.float32, order="C")


def orthonormal(ops: Ops, matrix: Array) -> Array:
    """Returns `orthonormalize` of a matrix float32[a, r] of the library's. A device for which the host need not wait computes the
    same bits by itself."""
    if not ops.defers:
        return ops.upload(orthonormalize(ops.host(matrix)))
    a, r = matrix.shape
    rows = ops.cast(ops.transpose(matrix, (1, 0)).reshape(-1), "float64").reshape(r, a)
    for j in range(r):
        column = rows[j]
        before = _length(ops, column)
        for _ in range(2 if j else 0):
            factors = ops.sums_of_rows(rows[:j] * column)
            for i in range(j):
                column = column - rows[i] * factors[i]
        norm = _length(ops, column)
        alive = norm > before * 1e-7
        rows[j] = column * ops.where(alive, 1 / ops.where(alive, norm, 1.0), 0.0)
    return ops.transpose(ops.cast(rows.reshape(-1), "float32").reshape(r, a), (1, 0))


def _length(ops: Ops, column: Array) -> Array:
    """Returns float64[1]: the 2-norm."""
    return ops.block_norms(column, len(column), 2)


class _LowRank(Compressor):
    """The base of low-rank compressors. A gradient is a matrix float[a, b] (first dimension x the rest); Q: float[b, r] is stored
    transposed, as float[r, b]. 0-d and 1-D tensors are sent dense."""

    wants_memory: ClassVar[bool] = True
    deterministic_bytes: ClassVar[bool] = False  # matrix products round differently from library to library
    rank: int

    def _shape(self, spec) -> tuple[int, int, int]:
        """Returns a, b, r. With `spec.rows`, a is this rank's rows, and r is for the whole matrix."""
        a, b = spec.shape[0] if spec.shape else 1, math.prod(spec.shape[1:])
        return a, b, min(self.rank, a if spec.rows is None else sum(spec.rows.counts), b)

    def sends_dense(self, spec):
        return len(spec.shape) < 2 or super().sends_dense(spec.whole)

    def _start(self, ops, spec, info, state):
        """Returns float[r * b]: the subspace, Q transposed, that this step starts from."""
        raise NotImplementedError

    def _received(self, ops, payload, spec):
        """Returns the factors of a payload: P, float[a, r] on the host, before its columns are made orthonormal; and Q, float[r, b]."""
        raise NotImplementedError

    def observed(self, ops, payload, spec, info, state):
        """M Q0 and P^T M for a matrix M: the subspace Q0 that the step starts from is the same on all ranks, and P spans M Q0. Q0 counts
        with orthonormal columns, so that both products are of the size of M."""
        a, b, r = self._shape(spec)
        p, q = self._received(ops, payload, spec)
        p = ops.upload(orthonormalize(p))
        start = ops.upload(orthonormalize(ops.host(self._start(ops, spec, info, state)).reshape(r, b).T))

        def operator(x):
            m = x.reshape(a, b)
            return ops.concat([(m @ start).reshape(-1), (p.T @ m).reshape(-1)])

        return Observed(ops.concat([(p @ (q @ start)).reshape(-1), q.reshape(-1)]), operator)

    def resized(self, ops, key, before, fresh):
        """Keeps the columns of Q (stored as rows) that exist at both values of `rank`; further ones are those of the first step."""
        common = min(len(before), len(fresh))
        return ops.concat([before[:common], fresh[common:]])

    def _draw(self, ops, spec, info, step):
        _, b, r = self._shape(spec)
        return ops.upload(rng.normals(info.shared_key(spec.name, "powersgd", step), b * r))


def kept_subspace(ops: Ops, q: Array, before: Array, p: Array) -> Array:
    """Returns the subspace that the next step starts from, flat: q (float[r, b]), but the row of `before` for a column of P that is all
    zeros. P may be on the host."""
    alive = (p != 0).any(0)
    alive = ops.upload(alive) if isinstance(alive, np.ndarray) else alive
    return ops.where(alive.reshape(-1, 1), q, before).reshape(-1)
