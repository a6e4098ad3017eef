"""Handles several small tensors that lie end to end in one call, instead of one call per tensor. `ends`: where each of them ends."""

from __future__ import annotations

import numpy as np

from .bits import add_bits, bit_positions, compensate_signs, set_bits, subtract_signs
from .compile import f32, f64, flag, i64, inlined, kernel, read, u8, write
from .elementwise import magnitude
from .select import elias_fano, open_elias_fano
from .sizes import smallest_elias_fano

_smallest = inlined(smallest_elias_fano)
BITMAP = -1


@inlined
def code(k, d):
    """Returns (low bits of the Elias-Fano code of k positions of d, or BITMAP; bytes), as the index coding 'auto' chooses."""
    if k == 0 or k == d:
        return BITMAP, 0
    low, size = _smallest(k, d)
    whole = (d + 7) // 8
    return (low, size) if size < whole else (BITMAP, whole)


@inlined
def number(data, at):
    """Returns the number in 4 bytes, little-endian."""
    return np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16 | np.int64(data[at + 3]) << 24


@inlined
def put_number(value, out, at):
    for byte in range(4):
        out[at + byte] = (value >> (8 * byte)) & 255


@kernel(read(u8), read(i64), read(i64), read(flag))
def extent(data, counts, items, variable):
    """Returns how many bytes these fields take at the beginning of `data`: arrays of `counts` items of `items` bytes each or, if variable,
    of as many items as their first 4 bytes say. Returns -1 if these are more than `counts`, or take more bytes than there are."""
    at = 0
    for field in range(len(counts)):
        count = counts[field]
        if variable[field]:
            if at + 4 > len(data):
                return -1
            count, at = number(data, at), at + 4
            if count > counts[field]:
                return -1
        at += count * items[field]
        if at > len(data):
            return -1
    return at


@kernel(read(i64), read(u8), i64, read(i64), read(i64), flag, write(u8))
def merge_sparse(positions, values, item, found, ends, counted, out):
    """Writes the payloads of compressors/forms/sparse.py, one after the other, to `out`, which is zeros at first: each tensor's values, of
    `item` bytes, and their positions, which end at `found`; both after their number if they are counted."""
    at, first, start = 0, 0, 0
    for t in range(len(ends)):
        k, d = found[t] - first, ends[t] - start
        low, size = code(k, d)
        if counted:
            put_number(k, out, at)
            at += 4
        for j in range(item * first, item * found[t]):
            out[at] = values[j]
            at += 1
        if counted:
            put_number(size, out, at)
            at += 4
        if size:
            mine, here = positions[first : found[t]], out[at : at + size]
            if low == BITMAP:
                set_bits(mine - start, here)
            else:
                elias_fano(mine, start, low, here)
        at, first, start = at + size, found[t], ends[t]


@kernel(read(u8), i64, read(i64), read(i64), flag, write(i64), write(u8))
def open_sparse(data, item, most, ends, counted, positions, values):
    """Inverts merge_sparse, for tensors with at most `most` values each (exactly so many, if they are not counted). Returns how many there
    are in all, or -1 if anything in `data` does not fit."""
    at, first, start = 0, 0, 0
    for t in range(len(ends)):
        k, d = most[t], ends[t] - start
        if counted:
            if at + 4 > len(data):
                return -1
            k, at = number(data, at), at + 4
        if k > most[t] or first + k > len(positions) or at + item * k > len(data):
            return -1
        for j in range(item * k):
            values[item * first + j] = data[at + j]
        at += item * k
        low, size = code(k, d)
        if counted:
            if at + 4 > len(data) or number(data, at) != size:
                return -1
            at += 4
        if at + size > len(data):
            return -1
        mine, here = positions[first : first + k], data[at : at + size]
        if k == d:
            for j in range(k):
                mine[j] = j
        elif k:
            if low == BITMAP:
                if bit_positions(here, mine) != k or mine[k - 1] >= d:
                    return -1
            elif not open_elias_fano(here, low, d, mine):
                return -1
        for j in range(k):
            mine[j] += start
        at, first, start = at + size, first + k, ends[t]
    return first if at == len(data) else -1


@kernel(read(f32), read(i64), read(i64), write(i64))
def largest_each(x, ends, counts, positions):
    """Finds where each tensor's largest |x_j| are, `counts` of each, ascending; among equals the lowest positions. It looks at a byte of
    the magnitudes at a time, from the highest on, until it has all bits of the smallest that is kept."""
    found, start, how_many = 0, 0, np.empty(256, np.int64)
    for t in range(len(ends)):
        piece, missing, smallest, known = x[start : ends[t]], counts[t], np.int64(0), np.int64(0)
        for shift in (24, 16, 8, 0):
            how_many[:] = 0
            for j in range(len(piece)):
                bits = np.int64(magnitude(piece[j]))
                if bits & known == smallest:
                    how_many[(bits >> shift) & 255] += 1
            byte = 255
            while how_many[byte] < missing:
                missing -= how_many[byte]
                byte -= 1
            smallest, known = smallest | (byte << shift), known | (255 << shift)
        for j in range(len(piece)):
            bits = np.int64(magnitude(piece[j]))
            if bits > smallest or (bits == smallest and missing):
                missing -= bits == smallest
                positions[found] = start + j
                found += 1
        start = ends[t]


@kernel(read(f32), read(f32), f32, f32, read(i64), write(f32), write(u8), write(f64))
def compensate_signs_each(residual, grad, beta, gamma, ends, total, bits, sums):
    """Does compensate_signs for each tensor, whose signs begin at a byte of their own. Returns whether all of total is finite."""
    start, at, each = 0, 0, len(sums) // len(ends)
    for t in range(len(ends)):
        here = slice(start, ends[t])
        mine = sums[each * t : each * (t + 1)]
        if not compensate_signs(residual[here], grad[here], beta, gamma, total[here], bits[at:], mine):
            return False
        at, start = at + (ends[t] - start + 7) // 8, ends[t]
    return True


@kernel(write(f32), read(f32), read(f32), read(i64))
def subtract_signs_each(x, below, above, ends):
    """Does subtract_signs for each tensor."""
    start = 0
    for t in range(len(ends)):
        subtract_signs(x[start : ends[t]], below[t], above[t])
        start = ends[t]


@kernel(write(f32), read(u8), read(f32), read(f32), read(i64), f32)
def sum_signs_each(total, data, minus, plus, ends, divisor):
    """Computes total_j = the sum over ranks of the tensor's plus if a rank's bit j is one, else its minus, divided; the ranks' bits follow
    one another, and so do their plus and minus."""
    tensors = len(ends)
    ranks = len(plus) // tensors
    each = len(data) // ranks
    start, at = 0, 0
    for t in range(tensors):
        piece = total[start : ends[t]]
        for j in range(len(piece)):
            piece[j] = 0
        for rank in range(ranks):
            add_bits(piece, data[rank * each + at : (rank + 1) * each], plus[rank * tensors + t], minus[rank * tensors + t])
        if divisor != 1:
            for j in range(len(piece)):
                piece[j] /= divisor
        at, start = at + (ends[t] - start + 7) // 8, ends[t]
