"""Products of a matrix with a few columns, in one pass over the matrix. BLAS, made for larger factors, takes a pass for each."""

from __future__ import annotations

import numpy as np

from .compile import f32, f64, i64, kernel, read, write
from .elementwise import INFINITY, PIECE, magnitude


@kernel(read(f32), read(f32), fastmath={"reassoc", "contract"})
def dot(a, b):
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@kernel(read(f32), read(f32), f32, f32, read(f32), i64, i64, write(f32), write(f32))
def compensate_product(residual, grad, beta, gamma, q, rows, rank, x, p):
    """x_j = beta residual_j + gamma grad_j, and p += x Q, for x: float[rows, columns], Q by rows: float[rank, columns], and
    p: float[rows, rank]. Returns whether all of x is finite."""
    columns, most = len(x) // rows, np.uint32(0)
    for i in range(rows):
        for start in range(0, columns, PIECE):
            at, count = i * columns + start, min(PIECE, columns - start)
            piece, before, new = x[at : at + count], residual[at : at + count], grad[at : at + count]
            for j in range(len(piece)):
                piece[j] = beta * before[j] + gamma * new[j]
                most = max(most, magnitude(piece[j]))
            for r in range(rank):
                p[i * rank + r] += dot(piece, q[r * columns + start : r * columns + start + count])
    return most < INFINITY


@kernel(write(f32), read(f32), read(f32), i64, i64, f32)
def add_product(x, a, b, at, rank, sign):
    """x += sign times the part from column `at` on of a row of a @ b: a: float[rank], b: float[rank, columns]."""
    columns = len(b) // rank
    for r in range(rank):
        factor, other = sign * a[r], b[r * columns + at : r * columns + at + len(x)]
        for j in range(len(x)):
            x[j] += factor * other[j]


@kernel(write(f32), read(f32), read(f32), i64, i64)
def subtract_product(x, a, b, rows, rank):
    """x -= the elements of a @ b, for a: float[rows, rank] and b: float[rank, columns], in pieces of a row that stay in the cache."""
    columns = len(x) // rows
    for i in range(rows):
        for start in range(0, columns, PIECE):
            piece = x[i * columns + start : min(i * columns + start + PIECE, (i + 1) * columns)]
            add_product(piece, a[i * rank : (i + 1) * rank], b, start, rank, np.float32(-1))


@kernel(write(f32), write(f32), read(f32), read(f32), read(f32), i64, i64)
def products(out, x, a, b, sent, rows, rank):
    """out = the elements of a @ b, and x -= those of a @ sent, in one pass over both."""
    columns = len(x) // rows
    for i in range(rows):
        factors = a[i * rank : (i + 1) * rank]
        for start in range(0, columns, PIECE):
            at, end = i * columns + start, min(i * columns + start + PIECE, (i + 1) * columns)
            piece = out[at:end]
            for j in range(len(piece)):
                piece[j] = 0
            add_product(piece, factors, b, start, rank, np.float32(1))
            add_product(x[at:end], factors, sent, start, rank, np.float32(-1))


@kernel(read(f64), read(f64), fastmath={"reassoc", "contract"})
def dot64(a, b):
    total = 0.0
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@kernel(write(f64), i64)
def gram_schmidt(columns, rank):
    """`rank` columns, one after the other in memory, made orthonormal; see compressors/lowrank.orthonormalize."""
    rows, factors = len(columns) // rank, np.empty(rank)
    for j in range(rank):
        column = columns[j * rows : (j + 1) * rows]
        before = np.sqrt(dot64(column, column))
        for _ in range(2):
            for i in range(j):
                factors[i] = dot64(columns[i * rows : (i + 1) * rows], column)
            for i in range(j):
                other = columns[i * rows : (i + 1) * rows]
                for k in range(len(column)):
                    column[k] -= factors[i] * other[k]
        norm = np.sqrt(dot64(column, column))
        scale = 1 / norm if norm > 1e-7 * before else 0.0
        for k in range(len(column)):
            column[k] *= scale
