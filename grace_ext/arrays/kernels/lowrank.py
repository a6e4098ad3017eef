"""Multiplies a matrix by a few columns, in one pass over the matrix. BLAS, made for larger factors, takes a pass per column.

What a rank computes of its own gradient (compensate_product, project) is added in whatever order is fast. What all ranks compute alike, the
product P Q^T and an orthonormal P, has the same bits on all processors, and in the plain forms: each product and each sum is rounded, in
one order.
"""

from __future__ import annotations

import numpy as np

from .compile import LANES, every, f32, f64, i64, inlined, kernel, larger, largest, load, read, store, sum_of, write
from .elementwise import INFINITY, fold, magnitude
from .sizes import L1_PIECE, L2_PIECE

#: Columns of a product that are computed at a time: so many elements of a few rows stay in the first-level cache.
PIECE = 1024


@kernel(read(f32), read(f32), fastmath={"reassoc", "contract"})
def quick_dot(a, b):
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@inlined
def others(rank, columns):
    """Returns where the second to fourth row of Q begin: four are processed at once. If there are fewer, the last one repeats, unused."""
    return min(1, rank - 1) * columns, min(2, rank - 1) * columns, min(3, rank - 1) * columns


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
            p[i * rank + r] += quick_dot(x[at + done : end], q[r * columns + done : (r + 1) * columns])
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


@inlined
def add_rows(a, b, columns, start, out):
    """Adds to `out`, from column `start` on, the first of a times the first row of b, then the second times the second row, and so on. It
    takes four rows at a time, in this order."""
    end, fours = start + len(out), len(a) // 4 * 4
    for r in range(0, fours, 4):
        f, g, h, k, at = a[r], a[r + 1], a[r + 2], a[r + 3], r * columns
        one, two = b[at + start : at + end], b[at + columns + start : at + columns + end]
        three, four = b[at + 2 * columns + start : at + 2 * columns + end], b[at + 3 * columns + start : at + 3 * columns + end]
        for j in range(len(out)):
            out[j] = (((out[j] + f * one[j]) + g * two[j]) + h * three[j]) + k * four[j]
    for r in range(fours, len(a)):
        f, row = a[r], b[r * columns + start : r * columns + end]
        for j in range(len(out)):
            out[j] += f * row[j]


@inlined
def multiply(a, b, rows, inner, out):
    """Computes the elements of a @ b in the order of Ops.product, for a: float[rows, inner] and b: float[inner, columns], in pieces of
    columns that stay in the cache."""
    columns = len(out) // rows
    for start in range(0, columns, PIECE):
        for i in range(rows):
            piece = out[i * columns + start : i * columns + min(start + PIECE, columns)]
            piece[:] = 0
            add_rows(a[i * inner : (i + 1) * inner], b, columns, start, piece)


@kernel(read(f32), read(f32), i64, i64, write(f32))
def product(a, b, rows, inner, out):
    """Computes the elements of a @ b; see multiply."""
    multiply(a, b, rows, inner, out)


@kernel(read(f64), read(f64), i64, i64, write(f64))
def product_wide(a, b, rows, inner, out):
    """Does product in float64."""
    multiply(a, b, rows, inner, out)


@kernel(write(f32), read(f32), read(f32), i64, i64)
def subtract_product(x, a, b, rows, rank):
    """Computes x -= the elements of a @ b, for a: float[rows, rank] and b: float[rank, columns]."""
    columns, room = len(x) // rows, np.empty(PIECE, np.float32)
    for start in range(0, columns, PIECE):
        for i in range(rows):
            piece = x[i * columns + start : i * columns + min(start + PIECE, columns)]
            own = room[: len(piece)]
            own[:] = 0
            add_rows(a[i * rank : (i + 1) * rank], b, columns, start, own)
            for j in range(len(piece)):
                piece[j] -= own[j]


@inlined
def first_four(a, i, rank):
    """Returns vectors of the first four elements in row i of the matrix a; zeros in place of those that it does not have."""
    at, zero = i * rank, np.float32(0)
    second, third, fourth = a[at + 1] if rank > 1 else zero, a[at + 2] if rank > 2 else zero, a[at + 3] if rank > 3 else zero
    return every(a[at]), every(second), every(third), every(fourth)


@kernel(read(f32), read(f32), read(f32), read(f32), i64, i64, write(f32), write(f32))
def products(x, a, b, sent, rows, rank, unsent, out):
    """Computes unsent = x less the elements of a @ sent, and out = those of a @ b, in one pass over all; each product in the order of
    Ops.product. One of them may be the memory of x. Takes two rows at a time; if the last is alone, it is both of them."""
    columns, zero = len(x) // rows, every(np.float32(0))
    whole, (one, two, three) = columns // LANES * LANES, others(rank, columns)
    for i in range(0, rows, 2):
        below = min(i + 1, rows - 1)
        at, next_at, last = i * columns, below * columns, (below - i) * rank
        f0, f1, f2, f3 = first_four(a, i, rank)
        g0, g1, g2, g3 = first_four(a, below, rank)
        for j in range(0, whole, LANES):
            s0, s1, s2, s3 = load(sent, j), load(sent, one + j), load(sent, two + j), load(sent, three + j)
            b0, b1, b2, b3 = load(b, j), load(b, one + j), load(b, two + j), load(b, three + j)
            own, next_own = (((zero + f0 * s0) + f1 * s1) + f2 * s2) + f3 * s3, (((zero + g0 * s0) + g1 * s1) + g2 * s2) + g3 * s3
            mean, next_mean = (((zero + f0 * b0) + f1 * b1) + f2 * b2) + f3 * b3, (((zero + g0 * b0) + g1 * b1) + g2 * b2) + g3 * b3
            for r in range(4, rank):
                f, g, row = every(a[i * rank + r]), every(a[i * rank + last + r]), r * columns + j
                s, q = load(sent, row), load(b, row)
                own, next_own = own + f * s, next_own + g * s
                mean, next_mean = mean + f * q, next_mean + g * q
            here, next_here = load(x, at + j), load(x, next_at + j)
            store(unsent, at + j, here - own)
            store(unsent, next_at + j, next_here - next_own)
            store(out, at + j, mean)
            store(out, next_at + j, next_mean)
    for i in range(rows):
        for j in range(whole, columns):
            own, mean, at = np.float32(0), np.float32(0), i * columns + j
            for r in range(rank):
                own += a[i * rank + r] * sent[r * columns + j]
                mean += a[i * rank + r] * b[r * columns + j]
            unsent[at], out[at] = x[at] - own, mean


@kernel(read(f64), read(f64), write(f64))
def dot(a, b, room):
    """Returns the sum of the products of elements, in the order of arrays/sums.py."""
    width, total = min(len(a), L1_PIECE), 0.0
    for start in range(0, len(a), L1_PIECE):
        one, other = a[start : start + L1_PIECE], b[start : start + L1_PIECE]
        for j in range(len(one)):
            room[j] = one[j] * other[j]
        room[len(one) : width] = 0
        total += fold(room, width)
    return total


@kernel(write(f64), i64)
def gram_schmidt(columns, rank):
    """Makes `rank` columns, one after the other in memory, orthonormal; see compressors/forms/lowrank.orthonormalize."""
    rows, factors, room = len(columns) // rank, np.empty(rank), np.empty(L1_PIECE)
    for j in range(rank):
        column = columns[j * rows : (j + 1) * rows]
        before = np.sqrt(dot(column, column, room))
        for _ in range(2):
            for i in range(j):
                factors[i] = dot(columns[i * rows : (i + 1) * rows], column, room)
            for i in range(j):
                other = columns[i * rows : (i + 1) * rows]
                for k in range(len(column)):
                    column[k] -= factors[i] * other[k]
        norm = np.sqrt(dot(column, column, room))
        scale = 1 / norm if norm > 1e-7 * before else 0.0
        for k in range(len(column)):
            column[k] *= scale
