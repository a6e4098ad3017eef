"""What the low-rank compressors share: the matrix of a tensor, its starting subspace, and orthonormal columns."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...arrays import kernels
from ...parts import rng
from ..base import Compressor


def orthonormalize(matrix: np.ndarray) -> np.ndarray:
    """Columns made orthonormal by two passes of Gram-Schmidt in float64; a column that is zero, or depends on those before it,
    becomes zero. Never divides by zero, whatever the input."""
    if kernels.enabled():
        columns = matrix.T.astype(np.float64).reshape(-1)
        kernels.load().gram_schmidt(columns, matrix.shape[1])
        return columns.reshape(matrix.shape[::-1]).T.astype(np.float32, order="C")
    columns = matrix.astype(np.float64)
    for j in range(columns.shape[1]):
        column = columns[:, j].copy()
        before = np.linalg.norm(column)
        for _ in range(2):
            column -= columns[:, :j] @ (columns[:, :j].T @ column)
        norm = np.linalg.norm(column)
        columns[:, j] = column / norm if norm > 1e-7 * before else 0.0
    return columns.astype(np.float32)


class _LowRank(Compressor):
    """Base: a gradient as a matrix float[a, b] (first dimension x the rest), and Q: float[b, r], kept by rows as float[r, b]. 0-d and 1-D
    tensors are sent dense."""

    wants_memory: ClassVar[bool] = True
    deterministic_bytes: ClassVar[bool] = False  # matrix products round differently from library to library
    rank: int

    def _shape(self, spec) -> tuple[int, int, int]:
        a = spec.shape[0] if spec.shape else 1
        b = spec.size // a
        return a, b, min(self.rank, a, b)

    def sends_dense(self, spec):
        return len(spec.shape) < 2 or super().sends_dense(spec)

    def resized(self, ops, key, before, fresh):
        """Q is kept by rows, one a column of the matrix: those that both ranks have stay, further ones are as at the first step."""
        common = min(len(before), len(fresh))
        return ops.concat([before[:common], fresh[common:]])

    def _draw(self, ops, spec, info, step):
        _, b, r = self._shape(spec)
        return ops.upload(rng.normals(info.shared_key(spec.name, "powersgd", step), b * r))


def kept_subspace(ops, q, before, p_host: np.ndarray):
    """What the next step starts from: q (float[r, b]), or, where a column of P is dead, the row of it that was there before."""
    alive = p_host.any(axis=0)
    if alive.all():
        return ops.copy(q.reshape(-1))
    alive = ops.upload(alive.astype(np.float32)).reshape(-1, 1)
    return (q * alive + before * (1 - alive)).reshape(-1)
