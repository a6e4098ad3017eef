"""Codes of a few bits in bytes, lowest bit first."""

from __future__ import annotations

import numpy as np

from .compile import f32, flag, i64, kernel, read, u8, write
from .elementwise import PIECE


@kernel(read(i64), i64, write(u8))
def pack(codes, width, out):
    """The low `width` bits of each code, one after the other."""
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
    """The inverse: len(out) codes, for which `data` is long enough."""
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
    """Ones at these positions of `out`, zeros at first."""
    for j in range(len(positions)):
        out[positions[j] >> 3] |= np.uint8(1 << (positions[j] & 7))


@kernel(read(u8))
def count_bits(data):
    """How many ones there are."""
    ones = 0
    for at in range(len(data)):
        byte = data[at]
        for bit in range(8):
            ones += (byte >> bit) & 1
    return ones


@kernel(read(u8), write(i64))
def bit_positions(data, out):
    """Positions of the ones, ascending, into `out`, which has room for just them."""
    found = 0
    for at in range(len(data)):
        byte, bit = data[at], 0
        while byte:
            if byte & 1:
                out[found] = at * 8 + bit
                found += 1
            byte >>= 1
            bit += 1


@kernel(write(f32), read(u8), read(f32), read(f32), i64, f32, flag, f32)
def add_signs(total, data, minus, plus, block, factor, first, divisor):
    """total_j += factor plus[j // block] where bit j is one, else factor minus[j // block], and divided in the end. With `first`, total is
    taken for zero. Blocks are a multiple of 8 elements, or one alone."""
    for b in range(len(plus)):
        below, above = factor * minus[b], factor * plus[b]
        stop = min((b + 1) * block, len(total))
        for start in range(b * block, stop, PIECE):
            piece, bits = total[start : min(start + PIECE, stop)], data[start // 8 :]
            whole = len(piece) // 8
            if first:
                for j in range(len(piece)):
                    piece[j] = 0
            for at in range(whole):
                byte = bits[at]
                for bit in range(8):
                    piece[at * 8 + bit] += above if (byte >> bit) & 1 else below
            for j in range(whole * 8, len(piece)):
                piece[j] += above if (bits[j >> 3] >> (j & 7)) & 1 else below
            if divisor != 1:
                for j in range(len(piece)):
                    piece[j] /= divisor
