from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..parts.field import Field
from ..parts.part import knob
from ..parts.requests import AllReduce
from . import register
from .base import Exchanged
from .forms.lowrank import _LowRank, kept_subspace, orthonormal
from .forms.rows import added, all_rows, key_of, mean_in_shares, own_rows, share_of


class Factors(NamedTuple):
    """The factors of one exchange, P: float[a, r] and Q: float[r, b]. p, q: of the result. p_sent, q_sent: of what the memory subtracts."""

    p: Any
    q: Any
    p_sent: Any
    q_sent: Any


class _TwoSums(_LowRank):
    """The base of powersgd and powersgd_plus: sums P, then Q, each by an all-reduce."""

    summable: ClassVar[bool] = True
    rounds: ClassVar[tuple[str, ...]] = ("allreduce",)
    shares_rows: ClassVar[bool] = True
    shared_state: ClassVar[tuple[str, ...]] = ("powersgd_q", "powersgd_q_of_whole")
    feedback: str

    def fields(self, spec):
        a, b, r = self._shape(spec)
        share = share_of(spec, b * r)
        return Field("P", "float32", a * r), Field("Q", "float32", share.stop - share.start)

    def _two_sums(self, ops, x, spec, info, start, p_own=None):
        """Computes P and Q from the subspace `start`. Returns (Factors, or None if one overflowed; Q to start from next).
        `p_own`: x times Q, if that is known already. Of a matrix whose rows are shared, P is made orthonormal as a whole, and Factors has
        this rank's rows of it; Q of this replica is the sum over its rows."""
        a, b, r = self._shape(spec)
        before = start.reshape(r, b)
        p_sum = yield AllReduce(ops.multiply(x.reshape(a, b), before.T).reshape(-1) if p_own is None else p_own, "float32")
        p = orthonormal(ops, (yield from all_rows(ops, p_sum, spec, r)).reshape(-1, r))
        return (yield from self._projection(ops, x, spec, info, before, p))

    def _projection(self, ops, x, spec, info, before, p_whole):
        """Computes Q for the orthonormal columns of P, and returns what `_two_sums` does."""
        p = own_rows(p_whole, spec)
        q_own = (yield from added(self._projected(ops, p, x, spec), spec)).reshape(before.shape)
        q = (yield from mean_in_shares(ops, q_own.reshape(-1), spec)).reshape(before.shape)
        finite = ops.all_finite(q)  # else a rank's factor, or their sum, overflowed: nothing is sent, and all stays in the memory
        if ops.defers:
            p_whole, p, q, q_own = (ops.kept_if(finite, factor) for factor in (p_whole, p, q, q_own))
        elif not finite:
            return None, before.reshape(-1)
        return self._factors(info, p, q, q_own), kept_subspace(ops, q, before, p_whole)

    def _projected(self, ops, p, x, spec):
        """Returns P^T x, flat: zeros on a rank that has no row."""
        _, b, r = self._shape(spec)
        return ops.project(p, x).reshape(-1) if spec.size else ops.zeros(r * b)

    def _factors(self, info, p, q, q_own) -> Factors:
        return Factors(p, q, p, q_own if self.feedback == "local" else q * (info.divisor / info.size))

    def fused_rounds(self, ops, grad, feedback, spec, info, state, out):
        if feedback.residual is None or not spec.size or not ops.compiles(grad) or (start := self._start(ops, spec, info, state)) is None:
            return None
        a, _, r = self._shape(spec)
        found = ops.compensate_product(feedback, grad, start, a, r)
        return found and self._in_place(ops, *found, start, spec, info, out)

    def _in_place(self, ops, x, p_own, start, spec, info, out):
        a, _, r = self._shape(spec)
        factors, q = yield from self._two_sums(ops, x, spec, info, start, p_own)
        unsent = ops.empty(spec.size) if x is out else x
        if factors is None:
            unsent[:] = x
            return ops.zeros(spec.size), unsent, self._state(spec, q)
        aggregate = ops.empty(spec.size) if out is None else out
        flat = (np.ascontiguousarray(factor).reshape(-1) for factor in (factors.p, factors.q, factors.q_sent))
        ops.kernels.products(x, *flat, a, r, unsent, aggregate)
        return aggregate, unsent, self._state(spec, q)

    def _state(self, spec, q):
        return {key_of("powersgd_q", spec): q}

    def _alone(self, ops, m, start):
        """Returns the payload of a rank at world size 1, from the subspace `start`: P, then Q."""
        p = orthonormal(ops, ops.multiply(m, start.T))
        return tuple(ops.to_bytes(factor.reshape(-1), "float32") for factor in (p, ops.project(p, m.reshape(-1))))

    def decompress(self, ops, payload, spec, info):
        a, b, r = self._shape(spec)
        p, q = (ops.from_bytes(piece, "float32") for piece in payload)
        return ops.product(p.reshape(a, r), q.reshape(r, b))

    def _received(self, ops, payload, spec):
        a, b, r = self._shape(spec)
        p, q = (ops.from_bytes(piece, "float32") for piece in payload)
        return ops.host(p).reshape(a, r), q.reshape(r, b)


def outcome(ops, spec, factors: Factors | None) -> Exchanged:
    """Returns the approximations that the factors stand for; zeros if there are none, because nothing was sent."""
    if factors is None or not spec.size:
        return Exchanged(ops.zeros(spec.size), lambda: ops.zeros(spec.size), {})
    p, q, p_sent, q_sent = factors
    return Exchanged(ops.product(p, q), lambda: ops.product(p_sent, q_sent), {}, remove=lambda x: ops.subtract_product(x, p_sent, q_sent))


def feedback_knob():
    return knob("local", "approximation that the memory subtracts: with this rank's own Q, or with the mean Q", choices=("local", "mean"))


@register("powersgd")
@dataclass(frozen=True)
class PowerSGD(_TwoSums):
    """Sends a low-rank approximation, from one subspace iteration per step.

    The gradient is a matrix M_i: float[a, b] (first dimension x the rest); Q: float[b, r], r = min(rank, a, b), is equal on all ranks.
        P = mean_i(M_i Q);  P <- orthonormalize(P);  Q_i = M_i^T P;  Q = mean_i(Q_i);  result P Q^T.
    Two all-reduces in sequence: r a, then r b floats.  Wire: 4 r (a + b) bytes. 0-d and 1-D tensors, and matrices for which that is not
    less, are sent dense together with P. Q is drawn from the shared seed and then kept (warm start); warm_start=False draws it at every
    step. The memory subtracts P Q_i^T with this rank's own Q_i (feedback='local': a projection, so the residual cannot outgrow its
    input) or P Q^T (feedback='mean', as in the paper's code and PyTorch). A column of P that is zero or dependent becomes zero, and
    its column of Q is kept for the next step: a zero or rank-deficient gradient gives no NaN and loses no subspace. If Q overflows,
    nothing is sent.
    If ranks share the rows of a matrix (shards of a model, `fsdp_hook(..., share_low_rank=True)`), each exchanges its rows of P and an
    equal share of Q, and sums over these ranks give all of them P and Q of the whole matrix.
    Biased: pair with 'residual'. A rank of 1 to 4 is usual; a higher one costs bytes and orthogonalization time.
    Source: Vogels et al. 2019, alg. 1.
    """

    rank: int = knob(2, "rank of the approximation: columns of P and Q", low=1, high=4096, headline=True)
    warm_start: bool = knob(True, "start each step from the last step's subspace")
    feedback: str = feedback_knob()

    def init(self, ops, spec, info):
        return self._state(spec, self._draw(ops, spec, info, 0)) if self.warm_start else {}

    def _start(self, ops, spec, info, state):
        return state[key_of("powersgd_q", spec)] if self.warm_start else self._draw(ops, spec, info, info.step)

    def exchange(self, ops, x, spec, info, state, communicator):
        factors, q = yield from self._two_sums(ops, x, spec, info, self._start(ops, spec, info, state))
        return outcome(ops, spec, factors)._replace(state=self._state(spec, q))

    def _state(self, spec, q):
        return super()._state(spec, q) if self.warm_start else {}

    def compress(self, ops, x, spec, info, state):
        """Returns the payload of a rank at world size 1: P, then Q. Training runs `exchange` instead."""
        a, b, r = self._shape(spec)
        return self._alone(ops, x.reshape(a, b), self._start(ops, spec, info, state).reshape(r, b)), state
