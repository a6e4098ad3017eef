"""Packs codes of a few bits into bytes, lowest bit first, and adds up signs."""

from __future__ import annotations

import numpy as np

from .compile import LANES, add_either, f32, f64, i64, inlined, kernel, lowest_one, read, signs, u8, write
from .elementwise import INFINITY, compensate, magnitude_sum, most, side_sums
from .sizes import L1_PIECE


@kernel(read(i64), i64, write(u8))
def pack(codes, width, out):
    """Packs the low `width` bits of each code, one after the other."""
    acc, bits, at, mask = np.uint64(0), 0, 0, np.uint64((1 << width) - 1)
    for j in range(len(codes)):
        acc |= (np.uint64(codes[j]) & mask) << np.uint64(bits)
        bits += width
        while bits >= 8:
            out[at] = acc & np.uint64(255)
            acc >>= np.uint64(8)
            bits -= 8
            at += 1
    if bits:
        out[at] = acc


@kernel(read(u8), i64, write(i64))
def unpack(data, width, out):
    """Unpacks len(out) codes, for which `data` is long enough."""
    acc, bits, at, mask = np.uint64(0), 0, 0, np.uint64((1 << width) - 1)
    for j in range(len(out)):
        while bits < width:
            acc |= np.uint64(data[at]) << np.uint64(bits)
            bits += 8
            at += 1
        out[j] = acc & mask
        acc >>= np.uint64(width)
        bits -= width


@kernel(read(i64), write(u8))
def set_bits(positions, out):
    """Sets ones at these positions of `out`, which is zeros at first."""
    for j in range(len(positions)):
        out[positions[j] >> 3] |= np.uint8(1 << (positions[j] & 7))


@kernel(read(u8))
def count_bits(data):
    """Returns how many ones there are."""
    ones = 0
    for at in range(len(data)):
        byte = data[at]
        for bit in range(8):
            ones += (byte >> bit) & 1
    return ones


@kernel(read(u8), write(i64))
def bit_positions(data, out):
    """Writes the positions of the ones, ascending, to `out`. Returns how many there are, or -1 if `out` has no room for all."""
    found = 0
    for at in range(0, len(data), 8):
        eight = data[at : at + 8]
        word = np.uint64(0)
        if len(eight) == 8:  # one load, because the compiler sees the number
            for byte in range(8):
                word |= np.uint64(eight[byte]) << np.uint64(8 * byte)
        else:
            for byte in range(len(eight)):
                word |= np.uint64(eight[byte]) << np.uint64(8 * byte)
        while word:
            if found == len(out):
                return -1
            out[found] = 8 * at + lowest_one(word)
            word &= word - np.uint64(1)
            found += 1
    return found


@inlined
def add_bits(piece, bits, above, below):
    """Adds to piece_j `above` if bit j is one, else `below`."""
    whole = len(piece) // LANES * LANES
    for at in range(0, whole, LANES):
        two = np.uint64(bits[at >> 3]) | (np.uint64(bits[(at >> 3) + 1]) << np.uint64(8))
        add_either(piece, at, two, above, below)
    for j in range(whole, len(piece)):
        piece[j] += above if (bits[j >> 3] >> (j & 7)) & 1 else below


@kernel(write(f32), read(u8), read(f32), read(f32), i64, f32)
def sum_signs(total, data, minus, plus, block, divisor):
    """Computes total_j = the sum over ranks of plus[j // block] if a rank's bit j is one, else minus[j // block], divided; the ranks' bits
    follow one another, and so do their plus and minus. Blocks are a multiple of 8 elements, or there is only one."""
    each, blocks = (len(total) + 7) // 8, (len(total) + block - 1) // block
    for b in range(blocks):
        stop = min((b + 1) * block, len(total))
        for start in range(b * block, stop, L1_PIECE):
            piece = total[start : min(start + L1_PIECE, stop)]
            for j in range(len(piece)):
                piece[j] = 0
            for rank in range(len(plus) // blocks):
                at = rank * blocks + b
                add_bits(piece, data[rank * each + start // 8 : (rank + 1) * each], plus[at], minus[at])
            if divisor != 1:
                for j in range(len(piece)):
                    piece[j] /= divisor


@kernel(write(f32), read(u8), i64, f32)
def vote(total, ballots, ranks, tie):
    """Computes total_j = the sign of (ones - zeros) among bits j of the ranks' ballots, which follow one another; `tie` if it is 0."""
    each = (len(total) + 7) // 8
    for start in range(0, len(total), L1_PIECE):
        piece = total[start : start + L1_PIECE]
        for j in range(len(piece)):
            piece[j] = 0
        for rank in range(ranks):
            add_bits(piece, ballots[rank * each + start // 8 : (rank + 1) * each], np.float32(1), np.float32(-1))
        for j in range(len(piece)):
            piece[j] = np.float32(1) if piece[j] > 0 else (np.float32(-1) if piece[j] < 0 else tie)


@kernel(read(f32), write(u8))
def pack_signs(x, out):
    """Writes a bit per element: whether it is not below zero."""
    whole = len(x) // LANES * LANES
    for at in range(0, whole, LANES):
        bits = signs(x, at)
        out[at // 8], out[at // 8 + 1] = bits & np.uint64(255), bits >> np.uint64(8)
    for at in range(whole, len(x), 8):
        byte = 0
        for j in range(at, min(at + 8, len(x))):
            byte |= (x[j] >= 0) << (j - at)
        out[at // 8] = byte


@kernel(read(f32), write(u8))
def pack_signs_and_most(x, out):
    """Does pack_signs and most in one pass, and returns what most does; stops early at Inf or NaN."""
    found = np.uint32(0)
    for start in range(0, len(x), L1_PIECE):
        piece = x[start : start + L1_PIECE]
        found = max(found, most(piece))
        if found >= INFINITY:
            break
        pack_signs(piece, out[start // 8 :])
    return found


@kernel(read(f32), read(f32), f32, f32, write(f32), write(u8), write(f64))
def compensate_signs(residual, grad, beta, gamma, total, bits, sums):
    """Does compensate and pack_signs in one pass. Adds to `sums`, if it has one element, the sum of all |total_j|; if it has three, what
    side_sums finds. Returns whether all of total is finite; stops early if not."""
    room, width = np.empty(L1_PIECE), min(len(total), L1_PIECE)
    for start in range(0, len(total), L1_PIECE):
        x = total[start : start + L1_PIECE]
        if not compensate(residual[start : start + L1_PIECE], grad[start : start + L1_PIECE], beta, gamma, x):
            return False
        pack_signs(x, bits[start // 8 :])
        if len(sums) == 3:
            side_sums(x, width, room, sums)
        else:
            sums[0] += magnitude_sum(x, width, room)
    return True


@kernel(write(f32), f32, f32)
def subtract_signs(x, below, above):
    """Subtracts from x_j `below` if x_j < 0, else `above`."""
    for j in range(len(x)):
        x[j] -= below if x[j] < 0 else above
