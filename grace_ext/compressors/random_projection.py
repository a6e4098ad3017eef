from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts import rng
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Compressor, Observed

#: Sums of products of elements above this may leave float32's range: they are added in float64, and saturate.
LARGE = 1e28


@register("random_projection")
@dataclass(frozen=True)
class RandomProjection(Compressor):
    """Sends the product of a matrix with r random columns, the same on all ranks and new at every step (the unbiased rank-r compressor).

    The gradient is a matrix M: float[a, b] (first dimension x the rest).  U: float[b, r], r = min(rank, b), normal with variance 1 / r,
    drawn from (seed, parameter, step), so E[U U^T] = I.  M -> P = M U: float32[a, r];  decoded: P U^T.  U is never sent. Summable, because
    U is shared: one all-reduce of P, where powersgd needs two in sequence.
    Wire: 4 a r bytes. 0-d and 1-D tensors, and matrices for which that is not less (b <= rank), are sent dense.
    Unbiased: E||C(x) - x||^2 = (b + 1) / r ||x||^2, whatever the matrix is: an approximation of low rank is no better for a matrix of low
    rank. The bound that is declared for d elements has b = d. So use memory 'none', and a learning rate that is lower by about as much (the
    paper's is an eighth of SGD's for ranks 1 and 2); error feedback of it grows without bound. A higher `rank` sends more and adds less
    variance. Its use is to be compared with: PowerSGD, biased and with error feedback, trains far better for the same bytes.
    Source: Vogels et al. 2019, the ablation 'unbiased rank-r'.
    """

    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    matrices_only: ClassVar[bool] = True
    deterministic_bytes: ClassVar[bool] = False  # matrix products round differently from library to library
    rank: int = knob(2, "columns of the random matrix", low=1, high=4096, headline=True)

    def _shape(self, spec) -> tuple[int, int, int]:
        """Returns a, b, r."""
        a, b = spec.shape[0] if spec.shape else 1, math.prod(spec.shape[1:])
        return a, b, min(self.rank, b)

    def omega(self, d):
        return (d + 1) / min(self.rank, d)

    def fields(self, spec):
        a, _, r = self._shape(spec)
        return (Field("P", "float32", a * r),)

    def sends_dense(self, spec):
        return len(spec.shape) < 2 or super().sends_dense(spec)

    def _draw(self, ops, spec, info):
        """Returns U transposed: float32[r, b]."""
        _, b, r = self._shape(spec)
        normals = rng.normals(info.shared_key(spec.name, "random_projection"), b * r)
        return ops.upload((normals / np.float32(math.sqrt(r))).astype(np.float32)).reshape(r, b)

    def compress(self, ops, x, spec, info, state):
        a, b, _ = self._shape(spec)
        m, u = x.reshape(a, b), self._draw(ops, spec, info).T
        if ops.largest(x) > LARGE:
            m, u = _wide(ops, m), _wide(ops, u)
        return (ops.to_bytes((m @ u).reshape(-1), "float32"),), state

    def decompress(self, ops, payload, spec, info):
        a, _, r = self._shape(spec)
        p = ops.from_bytes(payload[0], "float32")
        if not ops.all_finite(p):  # the sum of the ranks' P overflowed
            return ops.full_nan(spec.size)
        decoded = ops.product(_wide(ops, p.reshape(a, r)), _wide(ops, self._draw(ops, spec, info)))
        return ops.from_bytes(ops.to_bytes(decoded, "float32"), "float32")  # too large for float32: saturates

    def observed(self, ops, payload, spec, info, state):
        """An observer sees M U, and knows U if the seed is known."""
        a, b, _ = self._shape(spec)
        u = self._draw(ops, spec, info).T
        return Observed(ops.from_bytes(payload[0], "float32"), lambda x: (x.reshape(a, b) @ u).reshape(-1))


def _wide(ops, matrix):
    return ops.cast(matrix.reshape(-1), "float64").reshape(matrix.shape)
