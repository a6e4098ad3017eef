from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays.sums import in_blocks, row_sums
from ..parts import rng
from ..parts.part import knob
from ..parts.requests import AllReduce
from . import register
from .base import Observed, whole
from .forms.lowrank import kept_subspace, orthonormalize
from .forms.rows import added, all_rows, key_of, mean_in_shares, own_rows
from .powersgd import _TwoSums, feedback_knob, outcome

#: Elements of a matrix that are multiplied at a time.
EXACT_PIECE = 1 << 20


def top_subspace(matrix: np.ndarray, r: int) -> np.ndarray:
    """Returns float32[r, b]: the first r right singular vectors of float[a, b], as rows; zero rows if the matrix has a lower rank. Uses the
    eigenvectors of the smaller of M M^T and M^T M, in float64."""
    m = matrix.astype(np.float64)
    m /= max(float(np.abs(m).max()), 1e-300)
    wide = m.shape[0] <= m.shape[1]
    values, vectors = np.linalg.eigh(m @ m.T if wide else m.T @ m)
    top = vectors[:, ::-1][:, :r]
    right = m.T @ top if wide else top
    right[:, values[::-1][:r] <= 1e-13 * max(values[-1], 0.0)] = 0
    return orthonormalize(right).T


def power_subspace(matrix: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Returns float32[r, b]: about the same subspace, by power iterations from float[r, b]."""
    m = matrix.astype(np.float64)
    m /= max(float(np.abs(m).max()), 1e-300)
    right = start.T
    for _ in range(iterations):
        right = m.T @ orthonormalize(m @ right)
    return orthonormalize(right).T


def exact_product(ops, matrix, rows: np.ndarray) -> np.ndarray:
    """Returns float64[r, a]: each of r rows times the matrix float[a, b], transposed; on the host. It has the same bits on every rank:
    products of float32 are exact in float64, and they are added in the order of arrays/sums.py. BLAS adds in the processor's own order."""
    (a, b), step, found = matrix.shape, max(1, EXACT_PIECE // matrix.shape[1]), []
    for at in range(0, a, step):
        piece = ops.cast(matrix[at : at + step].reshape(-1), "float64").reshape(-1, b)
        products = [(piece * ops.cast(ops.upload(row), "float64")).reshape(-1) for row in rows]
        found.append([row_sums(in_blocks(ops, each, b), ops.host) for each in products])
    return np.concatenate(found, axis=1)


@register("powersgd_plus")
@dataclass(frozen=True)
class PowerSGDPlus(_TwoSums):
    """Works as powersgd does, and computes the subspace anew from the exact mean gradient every `refresh_period` steps.

    Steps that are multiples of the period (step 0 is one) are refreshes; all others are powersgd, warm start included. At a refresh, with
    M_i: float[a, b]:
        M = mean_i(M_i), dense;  V: float[b, r] = its first r right singular vectors, from rank 0;  P = orthonormalize(M V);
        Q = M^T P;  result P Q^T, the best approximation of rank r;  the next step starts from Q.
    Every step has the same two all-reduces: at a refresh the first carries M_i instead of M_i Q, and the second V from rank 0 (zeros
    from the others) instead of Q_i, so that all ranks have the same V, however their singular vectors would round. The memory subtracts
    the same as with powersgd.
    Wire: 4 r (a + b) bytes, 4 (a b + r b) at a refresh; on average 4 (r (a + b) (T - 1) + a b + r b) / T for a period of T. If this average
    is not less than dense, the matrix is sent dense, as are 0-d and 1-D tensors.
    refresh='svd' is exact and takes O(a b min(a, b)) on rank 0, seconds for thousands of rows; 'randomized' makes `iterations` power
    iterations from a fresh Gaussian instead, O(a b r) each. A longer period costs less and lets the subspace lag behind; at a
    refresh the mean is contracted with delta = r / min(a, b), between refreshes nothing is promised (as for powersgd).
    Ranks may share the rows of a matrix, as with powersgd; at a refresh each of them then holds the mean of the whole matrix.
    Biased: pair with 'residual'. Source: Xie, Chen, Yuan 2025; that rank 0 computes the decomposition, and its form, are ours.
    """

    rank: int = knob(2, "rank of the approximation: columns of P and Q", low=1, high=4096, headline=True)
    refresh_period: int = knob(50, "steps from one refresh of the subspace to the next; 50 to 200 is usual", low=2, high=10**9)
    refresh: str = knob("svd", "how the subspace of the mean is found", choices=("svd", "randomized"))
    iterations: int = knob(4, "power iterations of refresh='randomized'", low=1, high=100)
    feedback: str = feedback_knob()

    def nbytes(self, spec):
        a, b, q, p = self._counts(spec)
        return 4 * (max(a * b, p) + q)

    def mean_nbytes(self, spec):
        a, b, q, p = self._counts(spec)
        return 4 * (q + (p * (self.refresh_period - 1) + a * b) / self.refresh_period)

    def _counts(self, spec):
        """Returns a, b, and the elements of Q and of P that this rank exchanges."""
        (a, b, _), (p, q) = self._shape(spec), self.fields(spec)
        return a, b, q.count, p.count

    def init(self, ops, spec, info):
        return self._state(spec, self._draw(ops, spec, info, 0))

    def _refreshes(self, info) -> bool:
        return info.step % self.refresh_period == 0

    def _subspace(self, matrix: np.ndarray, spec, info) -> np.ndarray:
        _, b, r = self._shape(spec)
        if self.refresh == "svd":
            return top_subspace(matrix, r)
        start = rng.normals(info.shared_key(spec.name, "powersgd_plus"), b * r).reshape(r, b)
        return power_subspace(matrix, start, self.iterations)

    def exchange(self, ops, x, spec, info, state, communicator):
        if self._refreshes(info):
            factors, q = yield from self._refresh(ops, x, spec, info, state[key_of("powersgd_q", spec)])
        else:
            factors, q = yield from self._two_sums(ops, x, spec, info, state[key_of("powersgd_q", spec)])
        return outcome(ops, spec, factors)._replace(state=self._state(spec, q))

    def _start(self, ops, spec, info, state):
        return None if self._refreshes(info) else state[key_of("powersgd_q", spec)]

    def observed(self, ops, payload, spec, info, state):
        """At a refresh the whole gradient travels."""
        if self._refreshes(info):
            return Observed(ops.from_bytes(payload[0], "float32"), whole)
        return super().observed(ops, payload, spec, info, state)

    def _refresh(self, ops, x, spec, info, start):
        _, b, r = self._shape(spec)
        mean = (yield from all_rows(ops, (yield AllReduce(x, "float32")), spec, b)).reshape(-1, b)
        overflowed = not ops.all_finite(mean)
        if overflowed:
            mean = ops.zeros(mean.shape[0] * b).reshape(-1, b)
        own = np.zeros((r, b), np.float32)
        if info.rank == 0 and (spec.rows is None or spec.rows.place == 0):  # one rank, as others might round to another basis
            own = self._subspace(ops.host(mean), spec.whole, info) * np.float32(info.divisor)
        own = yield from added(ops.upload(own.reshape(-1)), spec)
        v = (yield from mean_in_shares(ops, own, spec)).reshape(r, b)
        p_host = orthonormalize(exact_product(ops, mean, ops.host(v)).T)
        p = ops.upload(own_rows(p_host, spec))
        q_own = (yield from added(self._projected(ops, p, x, spec), spec)).reshape(r, b)
        q = ops.upload(exact_product(ops, ops.transpose(mean, (1, 0)), p_host.T).astype(np.float32))
        if overflowed or not ops.all_finite(q):
            return None, start
        if not ops.all_finite(q_own):
            q_own = q * (info.divisor / info.size)
        return self._factors(info, p, q, q_own), kept_subspace(ops, q, start.reshape(r, b), p_host)

    def compress(self, ops, x, spec, info, state):
        """Returns the factors of a rank at world size 1: P, then Q. Training runs `exchange` instead."""
        a, b, r = self._shape(spec)
        m, start = x.reshape(a, b), state["powersgd_q"].reshape(r, b)
        if self._refreshes(info):
            start = ops.upload(self._subspace(ops.host(m), spec, info))
        return self._alone(ops, m, start), state
