"""Makes one pass over all elements: adds gradient and residual, answers questions about values, computes norms of blocks.

Magnitudes are compared as integers: the bits of floats without their sign are ordered as the floats are, with Inf and NaN on top, and
integer comparisons become vector instructions. Loops run over slices from 0 to their length: only then are negative indices ruled out,
which would keep a loop from becoming vector instructions. Operations on two uint32 give a uint64 in numba; a result that is cut back at
once stays in vectors of 32 bits.
"""

from __future__ import annotations

import numpy as np

from .compile import bits_of, f32, f64, float_of, i64, inlined, kernel, read, write
from .sizes import L1_PIECE

MAGNITUDE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@inlined
def magnitude(x):
    """Returns uint32: the bits of |x|."""
    return np.uint32(bits_of(x) & MAGNITUDE)


@kernel(read(f32), read(f32), f32, f32, write(f32))
def compensate(residual, grad, beta, gamma, out):
    """Computes out_j = beta residual_j + gamma grad_j. Returns whether all of out is finite."""
    most = np.uint32(0)
    for j in range(len(out)):
        total = beta * residual[j] + gamma * grad[j]
        out[j] = total
        most = max(most, magnitude(total))
    return most < INFINITY


@kernel(read(f32))
def most(x):
    """Returns the bits of max |x_j|; Inf and NaN are above all numbers. Stops early at one of them."""
    found = np.uint32(0)
    for start in range(0, len(x), L1_PIECE):
        piece = x[start : start + L1_PIECE]
        for j in range(len(piece)):
            found = max(found, magnitude(piece[j]))
        if found >= INFINITY:
            break
    return found


@kernel(read(f32), i64, write(f64), fastmath={"reassoc"})
def block_sums(x, block, out):
    """Computes out_b = the sum of |x_j| over block b, in float64."""
    for b in range(len(out)):
        total = 0.0
        piece = x[b * block : (b + 1) * block]
        for j in range(len(piece)):
            total += np.float64(abs(piece[j]))
        out[b] = total


@kernel(read(f32), fastmath={"reassoc"})
def squares(x):
    """Returns the sum of x_j^2, in float64."""
    total = 0.0
    for j in range(len(x)):
        total += np.float64(x[j]) * np.float64(x[j])
    return total


@kernel(read(f32), i64, write(f64))
def block_squares(x, block, out):
    """Computes out_b = the sum of x_j^2 over block b, in float64."""
    for b in range(len(out)):
        total = 0.0
        for at in range(b * block, min((b + 1) * block, len(x)), L1_PIECE):
            total += squares(x[at : min(at + L1_PIECE, (b + 1) * block)])
        out[b] = total


@kernel(read(f32), i64, write(f64))
def block_largest(x, block, out):
    """Computes out_b = max |x_j| over block b."""
    for b in range(len(out)):
        found = np.uint32(0)
        piece = x[b * block : (b + 1) * block]
        for j in range(len(piece)):
            found = max(found, magnitude(piece[j]))
        out[b] = float_of(found)


@kernel(read(f32), write(f64), fastmath={"reassoc", "nsz"})
def side_sums(x, out):
    """Adds to out: the sum of |x_j| for x_j < 0, that of the other x_j, and how many are below zero."""
    below, above, number = 0.0, 0.0, np.uint32(0)
    for j in range(len(x)):
        below += np.float64(x[j] if x[j] < 0 else np.float32(0))
        above += np.float64(x[j] if x[j] > 0 else np.float32(0))
        number = np.uint32(number + (np.uint32(1) if x[j] < 0 else np.uint32(0)))
    out[0] -= below
    out[1] += above
    out[2] += number


@kernel(read(f32), write(f64), fastmath={"reassoc"})
def magnitude_stats(x, out):
    """Adds to out[0] the sum of |x_j| and to out[1] how many are not zero. out[2] becomes the largest, Inf for NaN."""
    for start in range(0, len(x), L1_PIECE):
        piece = x[start : start + L1_PIECE]
        total, number, found = 0.0, np.uint32(0), np.uint32(0)
        for j in range(len(piece)):
            total += np.float64(abs(piece[j]))
            number = np.uint32(number + (np.uint32(1) if piece[j] != 0 else np.uint32(0)))
            found = max(found, magnitude(piece[j]))
        out[0] += total
        out[1] += number
        out[2] = max(out[2], np.float64(float_of(min(found, INFINITY))))


@kernel(read(f32), read(f32), f32, f32, write(f32), write(f64), write(f32))
def compensate_stats(residual, grad, beta, gamma, total, out, spent):
    """Does compensate and magnitude_stats in one pass. `spent` is the gradient, if it is to become zeros as far as all is finite."""
    for start in range(0, len(total), L1_PIECE):
        x = total[start : start + L1_PIECE]
        compensate(residual[start : start + L1_PIECE], grad[start : start + L1_PIECE], beta, gamma, x)
        magnitude_stats(x, out)
        if out[2] == np.inf:
            break
        spent[start : start + L1_PIECE] = 0
