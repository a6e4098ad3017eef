"""Multiplies a matrix by a few columns, in one pass over the matrix. BLAS, made for larger factors, takes a pass per column."""

from __future__ import annotations

import numpy as np

from .compile import LANES, every, f32, f64, i64, inlined, kernel, larger, largest, load, read, store, sum_of, write
from .elementwise import INFINITY, magnitude
from .sizes import L1_PIECE, L2_PIECE


@kernel(read(f32), read(f32), fastmath={"reassoc", "contract"})
def dot(a, b):
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@inlined
def others(rank, columns):
    """Returns where the second to fourth row of Q begin: four are processed at once. If there are fewer, the last one repeats, unused."""
    return min(1, rank - 1) * columns, min(2, rank - 1) * columns, min(3, rank - 1) * columns


@inlined
def factor(a, i, r, rank):
    """Returns a vector of the element in row i and column r of the matrix a, zeros if there is no such column."""
    return every(a[i * rank + r] if r < rank else np.float32(0))


@inlined
def factors(a, i, r, rank):
    """Returns vectors of the elements in column r of four rows of the matrix a, from row i on."""
    return every(a[i * rank + r]), every(a[(i + 1) * rank + r]), every(a[(i + 2) * rank + r]), every(a[(i + 3) * rank + r])


@kernel(read(f32), read(f32), f32, f32, read(f32), i64, i64, write(f32), write(f32))
def compensate_product(residual, grad, beta, gamma, q, rows, rank, x, p):
    """Computes x_j = beta residual_j + gamma grad_j, and p += x Q, for x: float[rows, columns], Q by rows: float[rank, columns], and
    p: float[rows, rank]. Returns whether all of x is finite. x may be the gradient's own memory."""
    columns, most = len(x) // rows, np.uint32(0)
    whole, zero = columns // LANES * LANES, every(np.float32(0))
    one, two, three = others(rank, columns)
    for i in range(rows):
        at, end, top, a, b, c, d = i * columns, (i + 1) * columns, zero, zero, zero, zero, zero
        for j in range(0, whole, LANES):
            here = every(beta) * load(residual, at + j) + every(gamma) * load(grad, at + j)
            store(x, at + j, here)
            top = larger(here, top)
            a, b = a + here * load(q, j), b + here * load(q, one + j)
            c, d = c + here * load(q, two + j), d + here * load(q, three + j)
        most = max(most, largest(top))
        sums = sum_of(a), sum_of(b), sum_of(c), sum_of(d)
        for j in range(at + whole, end):
            x[j] = beta * residual[j] + gamma * grad[j]
            most = max(most, magnitude(x[j]))
        for r in range(rank):
            done = whole if r < 4 else 0
            p[i * rank + r] += dot(x[at + done : end], q[r * columns + done : (r + 1) * columns])
        for r in range(min(rank, 4)):
            p[i * rank + r] += sums[r]
    return most < INFINITY


@kernel(write(f32), f32, read(f32))
def add_multiple(x, factor, other):
    for j in range(len(x)):
        x[j] += factor * other[j]


@kernel(read(f32), read(f32), i64, i64, write(f32))
def project(x, p, rows, rank, q):
    """Computes q += P^T x, for x: float[rows, columns], P: float[rows, rank], and q by rows: float[rank, columns]. It takes four rows at
    a time, in stretches of columns that stay in the second-level cache with their sums."""
    columns, together, fours = len(x) // rows, rows // 4 * 4, rank // 4 * 4
    whole = columns // LANES * LANES
    for start in range(0, whole, L2_PIECE):
        end = min(whole, start + L2_PIECE)
        for i in range(0, together, 4):
            first = i * columns
            second, third, fourth = first + columns, first + 2 * columns, first + 3 * columns
            for base in range(0, fours, 4):
                one, a0, b0, c0, d0 = base * columns, *factors(p, i, base, rank)  # type: ignore[misc]  # mypy unpacks no Any
                two, a1, b1, c1, d1 = one + columns, *factors(p, i, base + 1, rank)  # type: ignore[misc]  # mypy unpacks no Any
                three, a2, b2, c2, d2 = two + columns, *factors(p, i, base + 2, rank)  # type: ignore[misc]  # mypy unpacks no Any
                four, a3, b3, c3, d3 = three + columns, *factors(p, i, base + 3, rank)  # type: ignore[misc]  # mypy unpacks no Any
                for j in range(start, end, LANES):
                    a, b, c, d = load(x, first + j), load(x, second + j), load(x, third + j), load(x, fourth + j)
                    store(q, one + j, load(q, one + j) + ((a * a0 + b * b0) + (c * c0 + d * d0)))
                    store(q, two + j, load(q, two + j) + ((a * a1 + b * b1) + (c * c1 + d * d1)))
                    store(q, three + j, load(q, three + j) + ((a * a2 + b * b2) + (c * c2 + d * d2)))
                    store(q, four + j, load(q, four + j) + ((a * a3 + b * b3) + (c * c3 + d * d3)))
            for r in range(fours, rank):
                at, a0, b0, c0, d0 = r * columns, *factors(p, i, r, rank)  # type: ignore[misc]  # mypy unpacks no Any
                for j in range(start, end, LANES):
                    a, b, c, d = load(x, first + j), load(x, second + j), load(x, third + j), load(x, fourth + j)
                    store(q, at + j, load(q, at + j) + ((a * a0 + b * b0) + (c * c0 + d * d0)))
    for i in range(0 if whole < columns else together, rows):
        done = whole if i < together else 0
        for r in range(rank):
            add_multiple(q[r * columns + done : (r + 1) * columns], p[i * rank + r], x[i * columns + done : (i + 1) * columns])


@kernel(write(f32), read(f32), read(f32), i64, i64)
def subtract_product(x, a, b, rows, rank):
    """Computes x -= the elements of a @ b, for a: float[rows, rank] and b: float[rank, columns], in pieces of a row that stay in the
    cache."""
    columns = len(x) // rows
    for i in range(rows):
        for start in range(0, columns, L1_PIECE):
            piece = x[i * columns + start : min(i * columns + start + L1_PIECE, (i + 1) * columns)]
            for r in range(rank):
                add_multiple(piece, -a[i * rank + r], b[r * columns + start : r * columns + start + len(piece)])


@kernel(read(f32), read(f32), read(f32), read(f32), i64, i64, write(f32), write(f32))
def products(x, a, b, sent, rows, rank, unsent, out):
    """Computes unsent = x less the elements of a @ sent, and out = those of a @ b, in one pass over all. One of them may be the memory of
    x."""
    columns = len(x) // rows
    whole = columns // LANES * LANES
    one, two, three = others(rank, columns)
    for i in range(rows):
        at, end = i * columns, (i + 1) * columns
        f, g, h, k = factor(a, i, 0, rank), factor(a, i, 1, rank), factor(a, i, 2, rank), factor(a, i, 3, rank)
        for j in range(0, whole, LANES):
            own = (f * load(sent, j) + g * load(sent, one + j)) + (h * load(sent, two + j) + k * load(sent, three + j))
            store(unsent, at + j, load(x, at + j) - own)
            store(out, at + j, (f * load(b, j) + g * load(b, one + j)) + (h * load(b, two + j) + k * load(b, three + j)))
        for j in range(at + whole, end):
            unsent[j], out[j] = x[j], 0
        for r in range(rank):
            done, here = whole if r < 4 else 0, a[i * rank + r]
            add_multiple(unsent[at + done : end], -here, sent[r * columns + done : (r + 1) * columns])
            add_multiple(out[at + done : end], here, b[r * columns + done : (r + 1) * columns])


@kernel(read(f64), read(f64), fastmath={"reassoc", "contract"})
def dot64(a, b):
    total = 0.0
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@kernel(write(f64), i64)
def gram_schmidt(columns, rank):
    """Makes `rank` columns, one after the other in memory, orthonormal; see compressors/forms/lowrank.orthonormalize."""
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
