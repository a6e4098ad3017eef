"""Encodes and decodes for qsgd: rounds at random to levels of a block's norm, all in one pass over gradient and residual.

A code is a level, with the sign in the bit above it. Codes are handled in pieces of 32-bit integers, which stay in the cache.
"""

from __future__ import annotations

import numpy as np

from .compile import f32, f64, flag, i32, i64, kernel, read, u8, u32, write
from .elementwise import compensate, squares
from .random import ONE, above_zero, settled, word
from .sizes import L1_PIECE

S8 = np.uint32(8)


@kernel(read(f32), f32, i32, i32, u32, u32, write(i32))
def round_randomly(x, scale, levels, sign, k0, k1, codes):
    """Computes the codes: |x_j| scale, rounded down or up at random (Ops.round_randomly), with the bit `sign` if x_j < 0."""
    least = ONE
    for j in range(len(codes)):
        scaled = abs(x[j]) * scale
        low = np.int32(scaled)
        gap = (scaled - np.float32(low)) * np.float32(2**24) - np.float32(np.int32(word(j, k0, k1) >> S8))
        least = min(least, above_zero(gap))
        level = min(np.int32(low + (gap > 0)), levels)
        codes[j] = level | sign if x[j] < 0 else level
    if least < ONE:  # of 2^24 draws one or none
        for j in range(len(codes)):
            scaled = abs(x[j]) * scale
            low = np.int32(scaled)
            gap = (scaled - np.float32(low)) * np.float32(2**24) - np.float32(np.int32(word(j, k0, k1) >> S8))
            if above_zero(gap) < ONE and not settled(np.float64(gap), np.uint32(j), k0, k1):
                level = min(low, levels)
                codes[j] = level | sign if x[j] < 0 else level


@kernel(read(i32), i64, i64, write(u8))
def pack_piece(codes, width, start, out):
    """Packs codes of `width` bits into `out`, from code number `start` on; those before it are there already. Fast for 8, 4 and 2 bits."""
    at, bits, done = start * width >> 3, start * width & 7, 0
    if bits == 0 and (width == 8 or width == 4 or width == 2):
        into = out[at : at + len(codes) * width // 8]
        if width == 8:
            for j in range(len(into)):
                into[j] = codes[j]
        elif width == 4:
            for j in range(len(into)):
                into[j] = codes[2 * j] | (codes[2 * j + 1] << 4)
        else:
            for j in range(len(into)):
                into[j] = codes[4 * j] | (codes[4 * j + 1] << 2) | (codes[4 * j + 2] << 4) | (codes[4 * j + 3] << 6)
        at, done = at + len(into), len(into) * 8 // width
    acc = np.uint64(out[at]) if bits else np.uint64(0)
    for j in range(done, len(codes)):
        acc |= np.uint64(codes[j]) << np.uint64(bits)
        bits += width
        while bits >= 8:
            out[at] = acc & np.uint64(255)
            acc >>= np.uint64(8)
            bits -= 8
            at += 1
    if bits:
        out[at] = acc


@kernel(read(u8), i64, i64, write(i32))
def unpack_piece(data, width, start, codes):
    """Unpacks as many codes as there is room for, from code number `start` on."""
    at, bits, done = start * width >> 3, start * width & 7, 0
    if bits == 0 and (width == 8 or width == 4 or width == 2):
        piece = data[at : at + len(codes) * width // 8]
        if width == 8:
            for j in range(len(piece)):
                codes[j] = piece[j]
        elif width == 4:
            for j in range(len(piece)):
                codes[2 * j] = piece[j] & 15
                codes[2 * j + 1] = piece[j] >> 4
        else:
            for j in range(len(piece)):
                codes[4 * j] = piece[j] & 3
                codes[4 * j + 1] = (piece[j] >> 2) & 3
                codes[4 * j + 2] = (piece[j] >> 4) & 3
                codes[4 * j + 3] = piece[j] >> 6
        at, done = at + len(piece), len(piece) * 8 // width
    if done == len(codes):
        return
    acc, bits, mask = np.uint64(data[at]) >> np.uint64(bits), 8 - bits, np.uint64((1 << width) - 1)
    for j in range(done, len(codes)):
        while bits < width:
            at += 1
            acc |= np.uint64(data[at]) << np.uint64(bits)
            bits += 8
        codes[j] = acc & mask
        acc >>= np.uint64(width)
        bits -= width


@kernel(read(f32), read(f32), f32, f32, read(f32), write(f32), i64, i64, f64, f32, i32, u32, u32, write(f32), write(u8))
def quantize(residual, grad, beta, gamma, x, left, block, width, largest, smallest, levels, k0, k1, norms, out):
    """Computes the norms and the packed codes of x. Norms are limited to `largest`; blocks whose norm is under `smallest` become zero. If
    `left` has elements, it is the same array as x: it first becomes p = beta residual + gamma grad, and in the end what is not sent.
    Returns whether all of x is finite."""
    room, sign = np.empty(L1_PIECE, np.int32), np.int32(1 << (width - 1))
    terms, at_once = np.empty(L1_PIECE), min(block, L1_PIECE)
    for b in range(len(norms)):
        first, last = b * block, min((b + 1) * block, len(x))
        total = 0.0
        for at in range(first, last, L1_PIECE):
            end = min(at + L1_PIECE, last)
            if len(left):
                compensate(residual[at:end], grad[at:end], beta, gamma, left[at:end])
            total += squares(x[at:end], at_once, terms)
        if not np.isfinite(total):
            return False
        norm = np.float32(min(np.sqrt(total), largest))
        norms[b] = norm = norm if norm >= smallest else np.float32(0)
        scale, unit = np.float32(levels) / norm if norm > 0 else np.float32(0), norm / np.float32(levels)
        for at in range(first, last, L1_PIECE):
            end = min(at + L1_PIECE, last)
            codes = room[: end - at]
            round_randomly(x[at:end], scale, levels, sign, np.uint32(k0 + at), k1, codes)
            pack_piece(codes, width, at, out)
            if len(left):
                piece = left[at:end]
                for j in range(len(piece)):
                    level = codes[j] & (sign - 1)
                    piece[j] -= np.float32(np.int32(-level if codes[j] & sign else level)) * unit
    return True


@kernel(write(f32), read(u8), read(f32), i64, i64, i32, flag, f32)
def add_levels(total, data, units, block, width, levels, first, divisor):
    """Adds to total_j the signed level of code j times units[j // block] (with `first`, 0 + that), and divides in the end. Returns False if
    a level is above `levels`."""
    room, sign = np.empty(L1_PIECE, np.int32), np.int32(1 << (width - 1))
    for b in range(len(units)):
        last = min((b + 1) * block, len(total))
        for at in range(b * block, last, L1_PIECE):
            end = min(at + L1_PIECE, last)
            codes, piece = room[: end - at], total[at:end]
            unpack_piece(data, width, at, codes)
            most = np.int32(0)
            for j in range(len(piece)):
                level = np.int32(codes[j] & (sign - 1))
                most = max(most, level)
                value = np.float32(np.int32(-level if codes[j] & sign else level)) * units[b]
                piece[j] = (np.float32(0) if first else piece[j]) + value
            if most > levels:
                return False
            if divisor != 1:
                for j in range(len(piece)):
                    piece[j] /= divisor
    return True
