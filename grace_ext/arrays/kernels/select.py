"""Handles sparse payloads: finds elements above a threshold, adds values at positions, and codes positions by Elias-Fano."""

from __future__ import annotations

import numpy as np

from .bits import bit_positions
from .compile import LANES, compresses, f32, flag, i32, i64, inlined, keep_abs, keep_at, kernel, lowest_one, reach, read, u8, u32, write
from .elementwise import INFINITY, compensate, fold, magnitude
from .sizes import L1_PIECE

ONE = np.uint64(1)
NOT_FINITE = -1
COMPRESSES = compresses()


def _selects(keep, of):
    """Returns the function that writes `of(x, j)` of all |x_j| >= threshold (given by its bits, above zero) in order to `out`, which has
    room for all, and returns how many. `keep` is the instruction for it, if the processor has one."""
    of = inlined(of)

    @inlined
    def select(x, threshold, out):
        found, whole = 0, len(x) // LANES * LANES
        for at in range(0, whole, LANES):
            if COMPRESSES:
                found += keep(x, at, threshold, out, found)
            else:
                over = reach(x, at, threshold)
                while over:
                    out[found] = of(x, at + lowest_one(over))
                    over &= over - ONE
                    found += 1
        for j in range(whole, len(x)):
            if magnitude(x[j]) >= threshold:
                out[found] = of(x, j)
                found += 1
        return found

    return select


_places = _selects(keep_at, lambda x, j: j)
_magnitudes = _selects(keep_abs, lambda x, j: abs(x[j]))


@kernel(read(f32), u32, write(i32))
def reaching(x, threshold, places):
    """Writes where |x_j| >= threshold (given by its bits, above zero), in order, to `places`, which has room for all. Returns how many."""
    return _places(x, threshold, places)


@inlined
def take(x, start, threshold, places, positions, values):
    """Writes what reaches the threshold in a piece that begins at `start` to `positions` and `values`. Returns how many, or NOT_FINITE."""
    found, most = reaching(x, threshold, places), np.uint32(0)
    for j in range(found):
        positions[j], values[j] = start + places[j], x[places[j]]
        most = max(most, magnitude(values[j]))
    return found if most < INFINITY else NOT_FINITE


@kernel(read(f32), u32, write(i64), write(f32), write(f32))
def collect(x, threshold, positions, values, taken):
    """Collects the x_j with |x_j| >= threshold (given by its bits, above zero), in order. Stops when L1_PIECE more might have no room.
    Returns (how many were found, or NOT_FINITE; the position it came to). `taken` is x's own memory, if what is found is to become zero."""
    found, places = 0, np.empty(L1_PIECE, np.int32)
    for start in range(0, len(x), L1_PIECE):
        piece = x[start : start + L1_PIECE]
        if found + len(piece) > len(values):
            return found, start
        here = take(piece, start, threshold, places, positions[found:], values[found:])
        if here < 0:
            return here, start
        if len(taken):
            for j in range(here):
                taken[start + places[j]] = 0
        found += here
    return found, len(x)


@kernel(read(f32), u32, write(f32))
def gather_above(x, threshold, out):
    """Writes the |x_j| >= threshold (given by its bits), in order, to `out`. Stops as `collect` does. Returns (how many, the position it
    came to, the bits of the least of them, or of Inf if there are none)."""
    found, least = 0, INFINITY
    for start in range(0, len(x), L1_PIECE):
        piece, into = x[start : start + L1_PIECE], out[found:]
        if len(into) < len(piece):
            return found, start, least
        here = _magnitudes(piece, threshold, into)
        for j in range(here):
            least = min(least, magnitude(into[j]))
        found += here
    return found, len(x), least


@kernel(read(f32), f32)
def total_above(x, least):
    """Returns the sum, in float64, of x_j - least, each in float32."""
    room, width, total = np.empty(L1_PIECE), min(len(x), L1_PIECE), 0.0
    for start in range(0, len(x), L1_PIECE):
        piece = x[start : start + L1_PIECE]
        room[len(piece) : width] = 0
        for j in range(len(piece)):
            room[j] = np.float64(piece[j] - least)
        total += fold(room, width)
    return total


@kernel(read(f32), read(f32), f32, f32, u32, write(f32), write(i64), write(f32), write(f32))
def sweep(residual, grad, beta, gamma, threshold, total, positions, values, spent):
    """Does compensate and collect in one pass: total_j = beta residual_j + gamma grad_j, but zero where its magnitude reaches the
    threshold; collects those. Stops and returns as collect. `spent` is the gradient, if it is to become zeros as far as that came
    and all is finite."""
    found, places = 0, np.empty(L1_PIECE, np.int32)
    for start in range(0, len(total), L1_PIECE):
        piece = total[start : start + L1_PIECE]
        if found + len(piece) > len(values):
            return found, start
        before, new = residual[start : start + L1_PIECE], grad[start : start + L1_PIECE]
        for j in range(len(piece)):
            piece[j] = beta * before[j] + gamma * new[j]
        here = take(piece, start, threshold, places, positions[found:], values[found:])
        if here < 0:
            return here, start
        for j in range(here):
            piece[places[j]] = 0
        spent[start : start + L1_PIECE] = 0
        found += here
    return found, len(total)


@kernel(read(f32), read(f32), f32, f32, read(i64), write(f32), write(f32), write(f32))
def compensate_at(residual, grad, beta, gamma, positions, total, values, spent):
    """Computes values = beta residual_j + gamma grad_j at these ascending positions; total_j = the same everywhere else, and zero there.
    Returns whether all are finite; `spent` as for sweep."""
    at = 0
    for start in range(0, len(total), L1_PIECE):
        piece = total[start : start + L1_PIECE]
        if not compensate(residual[start : start + L1_PIECE], grad[start : start + L1_PIECE], beta, gamma, piece):
            return False
        spent[start : start + L1_PIECE] = 0
        while at < len(positions) and positions[at] < start + len(piece):
            values[at], piece[positions[at] - start] = piece[positions[at] - start], 0
            at += 1
    return True


@kernel(write(f32), write(i64), write(f32), read(flag))
def put_back(total, positions, values, which):
    """Keeps the positions and values that `which` selects, in order at the beginning of both, and returns how many; puts the other values
    back at their positions of `total`, if that is not empty."""
    kept = 0
    for j in range(len(which)):
        if which[j]:
            positions[kept], values[kept] = positions[j], values[j]
            kept += 1
        elif len(total):
            total[positions[j]] = values[j]
    return kept


@kernel(write(f32), read(i64), read(f32))
def put_at(total, positions, values):
    """Sets total[p_j] = values_j, for positions in range."""
    for j in range(len(positions)):
        total[positions[j]] = values[j]


@kernel(write(f32), read(i64), read(f32), f32)
def add_at(total, positions, values, factor):
    """Adds factor values_j to total[p_j], for positions that are distinct and in range."""
    for j in range(len(positions)):
        total[positions[j]] += factor * values[j]


@kernel(write(f32), read(i64), read(f32), read(i64), f32)
def add_sparse(total, positions, values, ends, divisor):
    """Computes total = the sum over ranks of their values at their positions, divided: rank r's are those from ends[r - 1] to ends[r]. It
    works through `total` in pieces that stay in the cache, so that each is written once."""
    ranks = len(ends)
    at = np.zeros(ranks, np.int64)
    for r in range(1, ranks):
        at[r] = ends[r - 1]
    for start in range(0, len(total), L1_PIECE):
        piece = total[start : start + L1_PIECE]
        end = start + len(piece)
        for j in range(len(piece)):
            piece[j] = 0
        touched = False
        for r in range(ranks):
            j = at[r]
            while j < ends[r] and positions[j] < end:
                total[positions[j]] += values[j]
                j += 1
            touched = touched or j > at[r]
            at[r] = j
        if touched and divisor != 1:
            for j in range(len(piece)):
                piece[j] /= divisor


@kernel(write(f32), read(i64), read(f32), read(i64), f32)
def add_to_zeros(total, positions, values, ends, divisor):
    """Does add_sparse for a total that holds zeros: touches only those of its elements to which something is added."""
    ranks, touched = len(ends), np.zeros(L1_PIECE // 64, np.uint64)
    at = np.zeros(ranks, np.int64)
    for r in range(1, ranks):
        at[r] = ends[r - 1]
    for start in range(0, len(total), L1_PIECE):
        piece = total[start : start + L1_PIECE]
        end = start + len(piece)
        for r in range(ranks):
            j = at[r]
            while j < ends[r] and positions[j] < end:
                place = positions[j] - start
                piece[place] += values[j]
                touched[place >> 6] |= ONE << np.uint64(place & 63)
                j += 1
            at[r] = j
        for word in range(len(touched)):
            while touched[word]:  # once per element, however many ranks added to it
                piece[64 * word + lowest_one(touched[word])] /= divisor
                touched[word] &= touched[word] - ONE


@kernel(read(i64), i64, i64, write(u8))
def elias_fano(positions, start, low, out):
    """Writes the code of ascending positions, counted from `start`, to `out`, which is zeros at first: the low bits of each, packed, then
    the rest in unary."""
    acc, bits, at, mask = np.uint64(0), 0, 0, (1 << low) - 1
    high = (len(positions) * low + 7) // 8
    for j in range(len(positions)):
        position = positions[j] - start
        acc |= np.uint64(position & mask) << np.uint64(bits)
        bits += low
        while bits >= 8:
            out[at] = acc & np.uint64(255)
            acc >>= np.uint64(8)
            bits -= 8
            at += 1
        one = (position >> low) + j
        out[high + (one >> 3)] |= np.uint8(1 << (one & 7))
    if bits:
        out[at] = acc


@kernel(read(u8), i64, i64, write(i64))
def open_elias_fano(data, low, d, out):
    """Inverts elias_fano, into `out`. Returns whether these are exactly that many ascending positions below d."""
    k = len(out)
    if bit_positions(data[(k * low + 7) // 8 :], out) != k:
        return False
    read_at, acc, bits, last, ascending = 0, np.uint64(0), 0, np.int64(-1), True
    mask = np.uint64((1 << low) - 1)
    for j in range(k):
        while bits < low:
            acc |= np.uint64(data[read_at]) << np.uint64(bits)
            read_at += 1
            bits += 8
        position = ((out[j] - j) << low) | np.int64(acc & mask)
        acc >>= np.uint64(low)
        bits -= low
        ascending &= position > last
        out[j] = last = position
    return ascending and last < d
