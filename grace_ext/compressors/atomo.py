from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..arrays.numpy import NumpyOps
from ..errors import PayloadError
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .base import Compressor


def probabilities(sizes: np.ndarray, budget: float) -> np.ndarray:
    """Returns p_a = min(1, c |size_a|), with the c that makes their sum `budget` (or all of them 1); this choice has the least variance."""
    p, total = np.zeros(len(sizes)), sizes.sum()
    if total > 0:
        p = np.minimum(1, budget * (sizes / total))
    while True:
        free = (p < 1) & (p > 0)
        room, rest = budget - np.count_nonzero(p >= 1), p[free].sum()
        if not free.any() or room <= rest * (1 + 1e-12):
            return p
        p[free] = np.minimum(1, p[free] * (room / rest))


@register("atomo")
@dataclass(frozen=True)
class Atomo(Compressor):
    """Sends a random choice of singular triplets, scaled so that its expected value is the gradient (spectral ATOMO).

    The gradient is a matrix M: float[a, b] (first dimension x the rest), M = sum_i s_i u_i v_i^T.  C(M) = sum_i b_i (s_i / p_i) u_i v_i^T,
    b_i = 1 with probability p_i, independently, else 0;  p_i = min(1, c s_i) with sum p_i = min(rank, number of s_i > 0).
    M -> the factors sqrt(s_i / p_i) u_i: float32[m, a] and sqrt(s_i / p_i) v_i: float32[m, b] of the m triplets that were drawn; m is
    `rank` on average.
    Wire: 4 m (a + b) + 8 bytes. 0-d and 1-D tensors, and matrices for which rank (a + b) >= a b, are sent dense.
    Unbiased: E||C(x) - x||^2 <= (min(a, b) / rank - 1) ||x||^2, far less if the singular values fall fast; needs no memory. Each rank of
    the job draws for itself. Costs a singular value decomposition of every matrix at every step, in float64 on the host.
    A higher `rank` sends more and adds less variance. Source: Wang et al. 2018. Their published code draws again until it has exactly
    `rank` triplets, which makes it biased and may fail; here their number varies.
    """

    unbiased: ClassVar[bool] = True
    matrices_only: ClassVar[bool] = True
    deterministic_bytes: ClassVar[bool] = False  # linear algebra libraries round differently
    rank: int = knob(2, "singular triplets sent on average", low=1, high=4096, headline=True)

    def _shape(self, spec) -> tuple[int, int]:
        a = spec.shape[0] if spec.shape else 1
        return a, spec.size // a

    def omega(self, d):
        return max(0.0, math.isqrt(d) / self.rank - 1)

    def fields(self, spec):
        a, b = self._shape(spec)
        return Field("left", "float32", a * min(a, b), variable=True), Field("right", "float32", b * min(a, b), variable=True)

    def mean_nbytes(self, spec):
        a, b = self._shape(spec)
        return 8 + 4 * min(self.rank, a, b) * (a + b)

    def sends_dense(self, spec):
        return len(spec.shape) < 2 or super().sends_dense(spec)

    def compress(self, ops, x, spec, info, state):
        a, b = self._shape(spec)
        left, sizes, right = np.linalg.svd(ops.host(x).astype(np.float64).reshape(a, b), full_matrices=False)
        p = probabilities(sizes, self.rank)
        drawn = NumpyOps().drawn(p, info.private_key(spec.name, "atomo"))
        weights = np.sqrt(sizes[drawn] / p[drawn])[:, None]
        factors = weights * left.T[drawn], weights * right[drawn]
        return tuple(ops.to_bytes(ops.upload(factor.astype(np.float32).reshape(-1)), "float32") for factor in factors), state

    def decompress(self, ops, payload, spec, info):
        a, b = self._shape(spec)
        left, right = (ops.cast(ops.from_bytes(piece, "float32"), "float64") for piece in payload)
        count = len(left) // a
        if len(left) != count * a or len(right) != count * b:
            raise PayloadError(f"has factors of {len(left)} and {len(right)} elements for a matrix of {a} x {b}")
        if not (ops.all_finite(left) and ops.all_finite(right)):
            raise PayloadError("has a factor that is not finite")
        whole = ops.product(left.reshape(count, a).T, right.reshape(count, b))
        return ops.from_bytes(ops.to_bytes(whole, "float32"), "float32")  # too large for float32: saturates
