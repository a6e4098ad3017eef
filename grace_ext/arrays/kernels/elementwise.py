"""Makes one pass over all elements: adds gradient and residual, answers questions about values, computes norms of blocks.

Magnitudes are compared as integers: the bits of floats without their sign are ordered as the floats are, with Inf and NaN on top, and
integer comparisons become vector instructions. Loops run over slices from 0 to their length: only then are negative indices ruled out,
which would keep a loop from becoming vector instructions. Operations on two uint32 give a uint64 in numba; a result that is cut back at
once stays in vectors of 32 bits.
"""

from __future__ import annotations

import numpy as np

from .compile import bits_of, f32, f64, flag, float_of, i64, inlined, kernel, read, write
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


@inlined
def fold(room, left):
    """Returns the sum of the first elements of `room`, `left` in number, which it overwrites, in the order of arrays/sums.py."""
    while left > 1 and left != 16:
        half = left >> 1
        lower, upper = room[:half], room[left - half : left]
        for j in range(len(lower)):
            lower[j] += upper[j]
        left -= half
    if left == 16:  # the same, without loops
        for j in range(8):
            room[j] += room[j + 8]
        return ((room[0] + room[4]) + (room[2] + room[6])) + ((room[1] + room[5]) + (room[3] + room[7]))
    return room[0]


@inlined
def magnitude_sum(x, width, room):
    """Returns the sum of |x_j|, in float64. x is a piece (see arrays/sums.py), or the first elements of one of `width`."""
    here = room[: len(x)]
    for j in range(len(x)):
        here[j] = np.float64(abs(x[j]))
    room[len(x) : width] = 0
    return fold(room, width)


@inlined
def squares(x, width, room):
    """Returns the sum of x_j^2, in float64; otherwise as magnitude_sum."""
    here = room[: len(x)]
    for j in range(len(x)):
        here[j] = np.float64(x[j]) * np.float64(x[j])
    room[len(x) : width] = 0
    return fold(room, width)


@kernel(read(f32), i64, flag, write(f64))
def block_sums(x, block, square, out):
    """Computes out_b = the sum of |x_j|, or of x_j^2, over block b, in float64."""
    room, width = np.empty(L1_PIECE), min(block, L1_PIECE)
    for b in range(len(out)):
        total, end = 0.0, min((b + 1) * block, len(x))
        for at in range(b * block, end, L1_PIECE):
            piece = x[at : min(at + L1_PIECE, end)]
            total += squares(piece, width, room) if square else magnitude_sum(piece, width, room)
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


@kernel(read(f32), i64, write(f64), write(f64))
def side_sums(x, width, room, out):
    """Adds to out, for a piece of x: the sum of |x_j| for x_j < 0, that of the other x_j, and how many are below zero."""
    here, number = room[: len(x)], np.uint32(0)
    room[len(x) : width] = 0
    for j in range(len(x)):
        here[j] = np.float64(-x[j] if x[j] < 0 else np.float32(0))
        number = np.uint32(number + (np.uint32(1) if x[j] < 0 else np.uint32(0)))
    out[0] += fold(room, width)
    room[len(x) : width] = 0
    for j in range(len(x)):
        here[j] = np.float64(x[j] if x[j] > 0 else np.float32(0))
    out[1] += fold(room, width)
    out[2] += number


@kernel(read(f32), i64, write(f64), write(f64))
def piece_stats(x, width, room, out):
    """Does magnitude_stats for a piece of x."""
    number, found = np.uint32(0), np.uint32(0)
    for j in range(len(x)):
        number = np.uint32(number + (np.uint32(1) if x[j] != 0 else np.uint32(0)))
        found = max(found, magnitude(x[j]))
    out[0] += magnitude_sum(x, width, room)
    out[1] += number
    out[2] = max(out[2], np.float64(float_of(min(found, INFINITY))))


@kernel(read(f32), write(f64))
def magnitude_stats(x, out):
    """Adds to out[0] the sum of |x_j| and to out[1] how many are not zero. out[2] becomes the largest, Inf for NaN."""
    room, width = np.empty(L1_PIECE), min(len(x), L1_PIECE)
    for start in range(0, len(x), L1_PIECE):
        piece_stats(x[start : start + L1_PIECE], width, room, out)


@kernel(read(f32), read(f32), f32, f32, write(f32), write(f64), write(f32))
def compensate_stats(residual, grad, beta, gamma, total, out, spent):
    """Does compensate and magnitude_stats in one pass. `spent` is the gradient, if it is to become zeros as far as all is finite."""
    room, width = np.empty(L1_PIECE), min(len(total), L1_PIECE)
    for start in range(0, len(total), L1_PIECE):
        x = total[start : start + L1_PIECE]
        compensate(residual[start : start + L1_PIECE], grad[start : start + L1_PIECE], beta, gamma, x)
        piece_stats(x, width, room, out)
        if out[2] == np.inf:
            break
        spent[start : start + L1_PIECE] = 0
