from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .. import rng
from ..exchange import AllReduce
from ..parts import knob
from . import register
from .base import Compressor, Exchanged, Field


def orthonormalize(matrix: np.ndarray) -> np.ndarray:
    """Columns made orthonormal by two passes of Gram-Schmidt in float64; a column that is zero, or depends on those before it,
    becomes zero. Never divides by zero, whatever the input."""
    columns = matrix.astype(np.float64)
    for j in range(columns.shape[1]):
        column = columns[:, j].copy()
        before = np.linalg.norm(column)
        for _ in range(2):
            column -= columns[:, :j] @ (columns[:, :j].T @ column)
        norm = np.linalg.norm(column)
        columns[:, j] = column / norm if norm > 1e-7 * before else 0.0
    return columns.astype(np.float32)


@register("powersgd")
@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Sends a low-rank approximation, by one step of subspace iteration a step.

    The gradient as a matrix M_i: float[a, b] (first dimension x the rest), Q: float[b, r], r = min(rank, a, b), equal on all ranks.
        P = mean_i(M_i Q);  P <- orthonormalize(P);  Q_i = M_i^T P;  Q = mean_i(Q_i);  result P Q^T.
    Two all-reduces in sequence: r a, then r b floats.  Wire: 4 r (a + b) bytes. 0-d and 1-D tensors, and matrices for which that is not
    less, are sent dense beside P. Q starts from the shared seed and is kept (warm start); warm_start=False draws it at every step.
    What is remembered as sent is P Q_i^T with this rank's own Q_i (feedback='local': a projection, the residual cannot outgrow its
    input) or P Q^T (feedback='mean', as in the paper's code and PyTorch). A column of P that is zero or dependent becomes zero, and
    its column of Q is kept for the next step: a zero or rank-deficient gradient gives no NaN and loses no subspace.
    Biased: pair with 'residual'. Rank 1 to 4 is usual; higher costs bytes and orthogonalisation time. Source: Vogels et al. 2019, alg. 1.
    """

    summable: ClassVar[bool] = True
    wants_memory: ClassVar[bool] = True
    rounds: ClassVar[tuple[str, ...]] = ("allreduce",)
    deterministic_bytes: ClassVar[bool] = False  # matrix products round differently from library to library
    rank: int = knob(2, "columns of the approximation", low=1, high=4096, headline=True)
    warm_start: bool = knob(True, "start each step from the last step's subspace")
    feedback: str = knob("local", "which approximation the memory subtracts", choices=("local", "mean"))

    def _shape(self, spec) -> tuple[int, int, int]:
        a = spec.shape[0] if spec.shape else 1
        b = spec.size // a
        return a, b, min(self.rank, a, b)

    def fields(self, spec):
        a, b, r = self._shape(spec)
        return Field("P", "float32", a * r), Field("Q", "float32", b * r)

    def sends_dense(self, spec):
        return len(spec.shape) < 2 or super().sends_dense(spec)

    def _draw(self, ops, spec, info, step):
        _, b, r = self._shape(spec)
        return ops.upload(rng.normals(info.shared_key(spec.name, "powersgd", step), b * r))

    def init(self, ops, spec, info):
        return {"powersgd_q": self._draw(ops, spec, info, 0)} if self.warm_start else {}

    def exchange(self, ops, x, spec, info, state, communicator):
        a, b, r = self._shape(spec)
        m = x.reshape(a, b)
        start = state["powersgd_q"] if self.warm_start else self._draw(ops, spec, info, info.step)
        q_before = start.reshape(r, b)
        p_sum = yield AllReduce((m @ q_before.T).reshape(-1), "float32")
        p_host = orthonormalize(ops.host(p_sum).reshape(a, r))
        p = ops.upload(p_host)
        q_own = p.T @ m  # (r, b): far cheaper than m.T @ p
        q = (yield AllReduce(q_own.reshape(-1), "float32")).reshape(r, b)
        q_sent = q_own if self.feedback == "local" else q * (info.divisor / info.size)
        if self.warm_start:
            alive = ops.upload(p_host.any(axis=0).astype(np.float32)).reshape(r, 1)
            state = {"powersgd_q": (q * alive + q_before * (1 - alive)).reshape(-1)}
        return Exchanged((p @ q).reshape(-1), lambda: (p @ q_sent).reshape(-1), state)

    def compress(self, ops, x, spec, info, state):
        """The payload a rank alone in the world would send: P, then Q. What runs in training is `exchange`."""
        a, b, r = self._shape(spec)
        m = x.reshape(a, b)
        start = state["powersgd_q"] if self.warm_start else self._draw(ops, spec, info, info.step)
        p = ops.upload(orthonormalize(ops.host(m @ start.reshape(r, b).T)))
        q = p.T @ m
        return tuple(ops.to_bytes(factor.reshape(-1), "float32") for factor in (p, q)), state

    def decompress(self, ops, payload, spec, info):
        a, b, r = self._shape(spec)
        p, q = (ops.from_bytes(piece, "float32") for piece in payload)
        return (p.reshape(a, r) @ q.reshape(r, b)).reshape(-1)
