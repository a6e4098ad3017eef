"""Implements the equations of the compressors again, in float64 and as simply as possible, without the package's mathematics.

Each oracle is a function of the compensated gradients p_i of all ranks (float64 arrays in the tensor's shape) that returns
(the aggregate, what each rank sent). `Feedback` adds error feedback around one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

Arrays = list[np.ndarray]
Oracle = Callable[[Arrays], tuple[np.ndarray, Arrays]]


def mean(sent: Arrays) -> np.ndarray:
    return sum(sent[1:], sent[0]) / len(sent)


def averaged(one: Callable[[np.ndarray], np.ndarray]) -> Oracle:
    """Returns the oracle that averages one(gradient) over the ranks."""

    def oracle(p: Arrays) -> tuple[np.ndarray, Arrays]:
        sent = [one(x.reshape(-1)).reshape(x.shape) for x in p]
        return mean(sent), sent

    return oracle


def topk(ratio: float) -> Oracle:
    """Keeps the k largest magnitudes; ties go to the lowest position."""

    def one(x: np.ndarray) -> np.ndarray:
        k = max(1, min(x.size, math.ceil(ratio * x.size - 1e-9)))
        order = sorted(range(x.size), key=lambda j: (-abs(x[j]), j))
        kept = np.zeros_like(x)
        for j in order[:k]:
            kept[j] = x[j]
        return kept

    return averaged(one)


def threshold(limit: float) -> Oracle:
    return averaged(lambda x: np.array([v if abs(v) >= limit else 0.0 for v in x]))


def half(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that rounds to 16 bits by an independent implementation; float16 saturates."""
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return lambda x: np.clip(x, -65504, 65504).astype(kind).astype(np.float64) if dtype == "float16" else x.astype(kind).astype(np.float64)


def cast(dtype: str, *, rounded_mean: bool) -> Oracle:
    """Casts as fp16 and bf16 do: an all-reduce rounds the mean once more, a gather does not."""

    def oracle(p: Arrays) -> tuple[np.ndarray, Arrays]:
        sent = [half(dtype)(x) for x in p]
        result = mean(sent).astype(np.float32)
        return (half(dtype)(result) if rounded_mean else result), sent

    return oracle


def signsgd(ties: str = "zero", block: int | None = None) -> Oracle:
    """Returns sign(number of +1 votes - number of -1 votes); zeros vote +1, but a block of zeros does not vote."""

    def one(x: np.ndarray) -> np.ndarray:
        size, sent = block or x.size, np.where(x >= 0, 1.0, -1.0)
        for start in range(0, x.size, size):
            if not x[start : start + size].any():
                sent[start : start + size] = 0
        return sent

    def oracle(p: Arrays) -> tuple[np.ndarray, Arrays]:
        sent = [one(x.reshape(-1)).reshape(x.shape) for x in p]
        plus, minus = sum((s > 0).astype(int) for s in sent), sum((s < 0).astype(int) for s in sent)
        tied = np.where((plus > 0) & (ties == "plus"), 1.0, 0.0)
        return np.where(plus > minus, 1.0, np.where(plus < minus, -1.0, tied)), sent

    return oracle


def efsignsgd(block: int | None = None) -> Oracle:
    def one(x: np.ndarray) -> np.ndarray:
        size, out = block or x.size, np.zeros_like(x)
        for start in range(0, x.size, size):
            piece = x[start : start + size]
            out[start : start + size] = np.abs(piece).sum() / piece.size * np.where(piece >= 0, 1.0, -1.0)
        return out

    return averaged(one)


class PowerSGD:
    """Projects the mean on the column space of (mean M) Q, by singular vectors; only the span of Q matters."""

    def __init__(self, q: np.ndarray, feedback: str):
        self.q, self.feedback = q.astype(np.float64), feedback

    def __call__(self, p: Arrays) -> tuple[np.ndarray, Arrays]:
        matrices = [x.reshape(x.shape[0], -1) for x in p]
        average = mean(matrices)
        left, size, _ = np.linalg.svd(average @ self.q, full_matrices=False)
        basis = left[:, size > 1e-6 * size[0]]
        result = basis @ (basis.T @ average)
        sent = [result if self.feedback == "mean" else basis @ (basis.T @ m) for m in matrices]
        self.q = average.T @ basis
        return result.reshape(p[0].shape), [s.reshape(p[0].shape) for s in sent]


class Feedback:
    """Adds error feedback: p_i = beta e_i + gamma g_i;  e_i <- p_i - sent_i."""

    def __init__(self, oracle: Oracle, size: int, beta: float = 1.0, gamma: float = 1.0, on: bool = True):
        self.oracle, self.beta, self.gamma, self.on = oracle, beta, gamma, on
        self.residuals: list[np.ndarray | float] = [0.0] * size

    def step(self, gradients: Arrays) -> np.ndarray:
        p = [g.astype(np.float64) for g in gradients]
        if self.on:
            p = [self.beta * e + self.gamma * g for e, g in zip(self.residuals, p, strict=True)]
        result, sent = self.oracle(p)
        if self.on:
            self.residuals = [x - s for x, s in zip(p, sent, strict=True)]
        return result
