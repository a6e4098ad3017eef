from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..parts import rng
from ..parts.field import Field
from ..parts.part import knob
from ..parts.requests import AllReduce
from . import register
from .base import Observed, whole
from .forms.lowrank import kept_subspace, orthonormalize
from .forms.rows import added, all_rows, key_of, mean_in_shares, own_rows, share_of
from .forms.subspace import exact_product, power_subspace, top_of_gram, top_subspace, triangle
from .powersgd import Factors, _TwoSums, feedback_knob, outcome


@register("powersgd_plus")
@dataclass(frozen=True)
class PowerSGDPlus(_TwoSums):
    """Works as powersgd does, and computes the subspace anew from the gradients of all ranks every `refresh_period` steps.

    Steps that are multiples of the period (step 0 is one) are refreshes; all others are powersgd, warm start included. With
    refresh_period=1 every step is one: the paper's fresh singular vectors at every step. At a refresh, with M_i: float[a, b]:
        M = mean_i(M_i), dense;  V: float[b, r] = its first r right singular vectors, from rank 0;  P = orthonormalize(M V);
        Q = M^T P;  result P Q^T, the best approximation of rank r;  the next step starts from Q.
    Every step has the same two all-reduces: at a refresh the first carries M_i instead of M_i Q, and the second V from rank 0 (zeros
    from the others) instead of Q_i, so that all ranks have the same V, however their singular vectors would round. The memory subtracts
    the same as with powersgd.
    refresh='svd' is exact and takes O(a b min(a, b)) on rank 0, seconds for thousands of rows; 'randomized' makes `iterations` power
    iterations from a fresh Gaussian instead, O(a b r) each. 'gram' sums the smaller Gram matrix instead of the gradients:
        b <= a:  G = mean_i(M_i^T M_i), one triangle of it;  V = its first r eigenvectors;  P = mean_i(M_i V);    result P V^T;
        a < b:   G = mean_i(M_i M_i^T), one triangle of it;  P = its first r eigenvectors;  Q = mean_i(M_i^T P);  result P Q^T.
    G is not M^T M: it is that plus the mean of (M_i - M)^T (M_i - M). So V is the subspace that keeps most of all ranks' own gradients:
    mean_i ||M_i - M_i V V^T||^2, which is what their memories keep, is the least of all subspaces and at most
    (1 - r / min(a, b)) mean_i ||M_i||^2; 'svd' promises that of the mean alone. It is worse than 'svd' where the ranks differ most in
    directions in which their mean is small: these directions fill V, and less of the mean arrives per step. Eigenvectors come from
    orthogonal iterations on every rank, with the same bits (about as good if eigenvalues are close). Squares are summed in float32:
    singular values below 3e-4 of the largest are lost in its rounding, and if the squares overflow, or vanish (gradients below 1e-22),
    nothing is sent.
    Wire: 4 r (a + b) bytes. At a refresh 4 (a b + r b), more than without compression; with 'gram' 2 s (s + 1) + 4 r l for the shorter
    side s and the longer l, which is less than dense if r < (s - 1) / 2. 0-d and 1-D tensors, and matrices for which powersgd's bytes are
    not less than dense, are sent dense; what refreshes add is not counted, because it was asked for.
    A longer period costs less and lets the subspace lag behind; at a refresh the mean is contracted with delta = r / min(a, b), between
    refreshes nothing is promised (as for powersgd).
    Ranks may share the rows of a matrix, as with powersgd; at a refresh each of them then holds the mean of the whole matrix (with 'gram'
    none if b <= a, and if a < b the whole gradient of its replica).
    Biased: pair with 'residual'. Source: Xie, Chen, Yuan 2025; that rank 0 computes the decomposition, its form, and 'gram' are ours.
    """

    rank: int = knob(2, "rank of the approximation: columns of P and Q", low=1, high=4096, headline=True)
    refresh_period: int = knob(50, "steps from one refresh of the subspace to the next; 50 to 200 is usual", low=1, high=10**9)
    refresh: str = knob("svd", "how the subspace is found", choices=("svd", "randomized", "gram"))
    iterations: int = knob(4, "power iterations of refresh='randomized'", low=1, high=100)
    feedback: str = feedback_knob()

    @property
    def caution(self):
        if self.refresh_period > 1 or self.refresh == "gram":
            return None
        return (
            "sums the dense gradients at every step, and its factors besides: more bytes than no compression. Use refresh='gram', which "
            "sums a smaller matrix, or a refresh_period of 50 to 200 (or ignore this, if only the approximation matters)"
        )

    def fields(self, spec):
        return self._refresh_fields(spec) if self.refresh_period == 1 else super().fields(spec)

    def _refresh_fields(self, spec):
        """Returns what the two sums of a refresh carry."""
        (a, b, _), (p, q) = self._shape(spec), super().fields(spec)
        if self.refresh != "gram":
            return Field("M", "float32", a * b), Field("V", "float32", q.count)
        share = share_of(spec, self._side(spec) * (self._side(spec) + 1) // 2)
        return Field("Gram", "float32", share.stop - share.start), p if self._tall(spec) else q

    def _tall(self, spec) -> bool:
        """Whether the Gram matrix is that of the columns, M^T M: of the whole matrix, if ranks share its rows."""
        a, b, _ = self._shape(spec.whole)
        return b <= a

    def _side(self, spec) -> int:
        return min(self._shape(spec.whole)[:2])

    def nbytes(self, spec):
        return max(self._bytes_between(spec), _bytes(self._refresh_fields(spec)))

    def mean_nbytes(self, spec):
        return self._bytes_between(spec) + (_bytes(self._refresh_fields(spec)) - self._bytes_between(spec)) / self.refresh_period

    def _bytes_between(self, spec) -> int:
        """Returns the bytes of a step that is no refresh."""
        return _bytes(super().fields(spec))

    def sends_dense(self, spec):
        return len(spec.shape) < 2 or self._bytes_between(spec.whole) >= spec.whole.nbytes

    def init(self, ops, spec, info):
        return self._state(spec, self._draw(ops, spec, info, 0))

    def _refreshes(self, info) -> bool:
        return info.step % self.refresh_period == 0

    def _subspace(self, matrix: np.ndarray, spec, info) -> np.ndarray:
        _, b, r = self._shape(spec)
        if self.refresh == "randomized":
            return power_subspace(matrix, self._fresh(spec, info, b), self.iterations)
        return top_subspace(matrix, r)

    def _fresh(self, spec, info, side: int) -> np.ndarray:
        """Returns float32[r, side], drawn anew: the last step's subspace may be orthogonal to all that was never sent."""
        r = self._shape(spec)[2]
        return rng.normals(info.shared_key(spec.name, "powersgd_plus"), side * r).reshape(r, side)

    def exchange(self, ops, x, spec, info, state, communicator):
        step = self._two_sums if not self._refreshes(info) else self._by_gram if self.refresh == "gram" else self._refresh
        factors, q = yield from step(ops, x, spec, info, state[key_of("powersgd_q", spec)])
        return outcome(ops, spec, factors)._replace(state=self._state(spec, q))

    def _start(self, ops, spec, info, state):
        return None if self._refreshes(info) else state[key_of("powersgd_q", spec)]

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
        p_host, q = _best(ops, mean, v)
        p = ops.upload(own_rows(p_host, spec))
        q_own = (yield from added(self._projected(ops, p, x, spec), spec)).reshape(r, b)
        if overflowed or not ops.all_finite(q):
            return None, start
        if not ops.all_finite(q_own):
            q_own = q * (info.divisor / info.size)
        return self._factors(info, p, q, q_own), kept_subspace(ops, q, start.reshape(r, b), p_host)

    # --- refresh='gram' ------------------------------------------------------------------------------------------------
    def _by_gram(self, ops, x, spec, info, start):
        _, b, r = self._shape(spec)
        before, m = start.reshape(r, b), x.reshape(-1, b)
        if self._tall(spec):
            own = yield from added(self._triangle(ops, m.T @ m), spec)
        else:
            rows = (yield from all_rows(ops, x, spec, b)).reshape(-1, b)
            own = self._triangle(ops, rows @ rows.T)
        found = self._eigenvectors(ops, (yield from mean_in_shares(ops, own, spec)), spec, info)
        if not self._tall(spec):
            return (yield from self._projection(ops, x, spec, info, before, ops.upload(found.T)))
        v, p_own = ops.upload(found), (m @ ops.upload(found).T).reshape(-1)
        p = yield AllReduce(p_own, "float32")
        q = kept_subspace(ops, v, before, found.T)
        if not ops.all_finite(p):
            return None, q
        sent = p_own if self.feedback == "local" else p * (info.divisor / info.size)
        return Factors(p.reshape(-1, r), v, sent.reshape(-1, r), v), q

    def _triangle(self, ops, gram):
        return gram.reshape(-1)[ops.upload(triangle(len(gram)))]

    def _eigenvectors(self, ops, gram, spec, info) -> np.ndarray:
        """Returns float32[r, side], on the host: those of a Gram matrix of which this is the triangle."""
        side = self._side(spec)
        return top_of_gram(ops.host(gram), side, self._fresh(spec.whole, info, side))

    # --- the payload of one rank alone ---------------------------------------------------------------------------------
    def observed(self, ops, payload, spec, info, state):
        """At a refresh the whole gradient travels. With 'gram', it is its product with the eigenvectors; the Gram matrix is left out, which
        is no linear function of the gradient: it tells M up to a rotation."""
        if not self._refreshes(info):
            return super().observed(ops, payload, spec, info, state)
        first, second = (ops.from_bytes(piece, "float32") for piece in payload)
        if self.refresh != "gram":
            return Observed(first, whole)
        found, b = ops.upload(self._eigenvectors(ops, first, spec, info)), math.prod(spec.shape[1:])
        if self._tall(spec):
            return Observed(second, lambda x: (x.reshape(-1, b) @ found.T).reshape(-1))
        return Observed(second, lambda x: (found @ x.reshape(-1, b)).reshape(-1))

    def compress(self, ops, x, spec, info, state):
        """Returns the payload of a rank at world size 1: what a refresh sends if every step is one, else P, then Q. Training runs
        `exchange` instead."""
        a, b, r = self._shape(spec)
        m = x.reshape(a, b)
        if self.refresh_period == 1 and self.refresh == "gram":
            gram = self._triangle(ops, m.T @ m if self._tall(spec) else m @ m.T)
            found = ops.upload(self._eigenvectors(ops, gram, spec, info))
            return _floats(ops, gram, m @ found.T if self._tall(spec) else found @ m), state
        start = state["powersgd_q"].reshape(r, b)
        if self._refreshes(info):
            start = ops.upload(self._subspace(ops.host(m), spec, info))
        return (_floats(ops, x, start) if self.refresh_period == 1 else self._alone(ops, m, start)), state

    def decompress(self, ops, payload, spec, info):
        if self.refresh_period > 1:
            return super().decompress(ops, payload, spec, info)
        b = math.prod(spec.shape[1:])
        first, second = (ops.from_bytes(piece, "float32") for piece in payload)
        if self.refresh != "gram":
            p, q = _best(ops, first.reshape(-1, b), second.reshape(-1, b))
            return ops.product(ops.upload(p), q)
        found = ops.upload(self._eigenvectors(ops, first, spec, info))
        if self._tall(spec):
            return ops.product(second.reshape(-1, len(found)), found)
        return ops.product(ops.transpose(found, (1, 0)), second.reshape(-1, b))


def _best(ops, m, v):
    """Returns P: float32[a, r] on the host, with orthonormal columns that span M V, and Q = M^T P: float[r, b], for V: float[r, b]."""
    p = orthonormalize(exact_product(ops, m, ops.host(v)).T)
    return p, ops.upload(exact_product(ops, ops.transpose(m, (1, 0)), p.T).astype(np.float32))


def _floats(ops, *arrays):
    return tuple(ops.to_bytes(array.reshape(-1), "float32") for array in arrays)


def _bytes(fields) -> int:
    return sum(field.max_bytes for field in fields)
