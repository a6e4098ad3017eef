"""Computes the leading singular subspace of a matrix for powersgd_plus: from the matrix, or from the sum of its ranks' Gram matrices."""

from __future__ import annotations

import numpy as np

from ...arrays.numpy import NumpyOps
from ...arrays.sums import dots
from .lowrank import orthonormalize

#: Elements of a matrix that are multiplied at a time.
EXACT_PIECE = 1 << 20
#: Iterations on a Gram matrix end when one of them turns the subspace by less than this (sine of the angle), or after MOST_ITERATIONS.
LEAST_TURN, MOST_ITERATIONS = 1e-5, 64


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
        found.append([ops.host(ops.sums_of_rows(each.reshape(-1, b))) for each in products])
    return np.concatenate(found, axis=1)


def triangle(side: int) -> np.ndarray:
    """Returns int64[side (side + 1) / 2]: the flat positions, ascending, of a symmetric matrix's elements that are sent."""
    return np.flatnonzero(np.triu(np.ones((side, side), bool)))


def top_of_gram(sent: np.ndarray, side: int, start: np.ndarray) -> np.ndarray:
    """Returns float32[r, side]: the first r eigenvectors, as rows, of the symmetric matrix whose `triangle` was sent; zero rows if it has a
    lower rank, and if it overflowed or vanished.

    Orthogonal iterations from `start`, float[r, side], in the arithmetic of `exact_product`: all ranks compute the same bits, which LAPACK
    on different processors does not, so nobody has to send the result. Eigenvectors whose eigenvalues differ by little may be mixed: then
    each of them is about as good."""
    upper = np.zeros((side, side), np.float32)
    upper.reshape(-1)[triangle(side)] = sent
    gram = upper + np.triu(upper, 1).T
    if not (np.isfinite(gram).all() and gram.any()):
        return np.zeros_like(start, np.float32)
    found, ops = orthonormalize(start.T).T, NumpyOps()
    for _ in range(MOST_ITERATIONS):
        before, found = found, orthonormalize(exact_product(ops, gram, found).T).T
        if _turn(before, found) < LEAST_TURN:
            break
    return found


def _turn(before: np.ndarray, after: np.ndarray) -> float:
    """Returns how far the rows of `after` are from the span of the orthonormal rows of `before`: the largest distance."""
    basis, farthest = before.astype(np.float64), 0.0
    for row in after.astype(np.float64):
        for other, factor in zip(basis, dots(basis, row), strict=True):
            row -= factor * other
        farthest = max(farthest, float(dots(row[None], row)[0]))
    return farthest**0.5
