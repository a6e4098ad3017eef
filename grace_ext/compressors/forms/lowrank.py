"""Low-rank compressors share this code: the matrix of a tensor, its starting subspace, and orthonormal columns."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ...arrays import kernels
from ...arrays.sums import dots
from ...parts import rng
from ..base import Compressor


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


class _LowRank(Compressor):
    """The base of low-rank compressors. A gradient is a matrix float[a, b] (first dimension x the rest); Q: float[b, r] is stored
    transposed, as float[r, b]. 0-d and 1-D tensors are sent dense."""

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
        """Keeps the columns of Q (stored as rows) that exist at both values of `rank`; further ones are those of the first step."""
        common = min(len(before), len(fresh))
        return ops.concat([before[:common], fresh[common:]])

    def _draw(self, ops, spec, info, step):
        _, b, r = self._shape(spec)
        return ops.upload(rng.normals(info.shared_key(spec.name, "powersgd", step), b * r))


def kept_subspace(ops, q, before, p_host: np.ndarray):
    """Returns the subspace that the next step starts from, flat: q (float[r, b]), but the row of `before` for a column of P that is all
    zeros."""
    alive = p_host.any(axis=0)
    if alive.all():
        return ops.copy(q.reshape(-1))
    alive = ops.upload(alive.astype(np.float32)).reshape(-1, 1)
    return (q * alive + before * (1 - alive)).reshape(-1)
