"""Encodes and decodes for quantizers whose codes are handled as bytes: terngrad, natural, u8bit.

If `left` has elements, it is the same array as x, and what is sent is subtracted from it, piece by piece, while it is in the cache.
"""

from __future__ import annotations

import numpy as np

from .compile import copy_eight, f32, flag, float_of, i32, i64, kernel, read, u8, u32, write
from .elementwise import INFINITY, magnitude
from .random import ONE, above_zero, settled, word
from .sizes import L1_PIECE

S8, S9, S16, S23 = np.uint32(8), np.uint32(9), np.uint32(16), np.uint32(23)
MANTISSA, LOW16 = np.uint32(2**23 - 1), np.uint32(2**16 - 1)
TRITS = 5 * 512  # elements per piece of terngrad, in whole bytes
# Five bytes, a base-3 digit in each, times this have the number that the digits form in the fifth byte: no lower byte's sum exceeds 255.
FIVE, POWERS_OF_3 = np.uint64(2**40 - 1), np.uint64(sum(3 ** (4 - k) << 8 * k for k in range(5)))


@kernel(read(f32), write(f32), f32, u32, u32, write(u8))
def encode_trits(x, left, scale, k0, k1, out):
    """Encodes each element, limited to `scale`, as -1, 0 or 1 times it, rounded at random; five per byte."""
    room = np.empty(TRITS + 8, np.uint8)
    unit = scale if scale > 0 else np.float32(1)
    for at in range(0, len(x), TRITS):
        piece, base = x[at : at + TRITS], np.uint32(k0 + at)
        trits, least = room[: len(piece)], ONE
        for j in range(len(trits)):
            gap = min(abs(piece[j]), scale) / unit * np.float32(2**24) - np.float32(np.int32(word(j, base, k1) >> S8))
            least = min(least, above_zero(gap))
            one = np.int32(gap > 0)
            trits[j] = np.int32(1) + (np.int32(-one) if piece[j] < 0 else one)
        if least < ONE:  # of 2^24 draws one or none
            for j in range(len(trits)):
                gap = min(abs(piece[j]), scale) / unit * np.float32(2**24) - np.float32(np.int32(word(j, base, k1) >> S8))
                if above_zero(gap) < ONE and not settled(np.float64(gap), np.uint32(j), base, k1):
                    trits[j] = 1
        if len(left):
            rest = left[at : at + TRITS]
            for j in range(len(rest)):
                rest[j] -= np.float32(np.int32(trits[j]) - np.int32(1)) * scale
        room[len(piece) : len(piece) + 4] = 0
        into = out[at // 5 : (at + len(piece) + 4) // 5]
        for j in range(len(into)):
            digits = np.uint64(0)
            for k in range(8):  # one load, of which five bytes count
                digits |= np.uint64(room[5 * j + k]) << np.uint64(8 * k)
            into[j] = ((digits & FIVE) * POWERS_OF_3 >> np.uint64(32)) & np.uint64(255)


@kernel(write(f32), read(u8), read(f32), i64, f32)
def add_trits(total, data, values, ranks, divisor):
    """Computes total_j = the sum over ranks of the values of their trits j, divided. The ranks' bytes follow one another; `values` has, per
    rank, eight for each of the 256 bytes, of which the first five count. Returns False, with nothing done, if a byte has no five trits."""
    most = np.uint8(0)
    for at in range(len(data)):
        most = max(most, data[at])
    if most >= 243:
        return False
    each, room = (len(total) + 4) // 5, np.empty(TRITS + 8, np.float32)
    for at in range(0, len(total), TRITS):
        piece = total[at : at + TRITS]
        for j in range(len(piece)):
            piece[j] = 0
        for rank in range(ranks):
            codes = data[rank * each + at // 5 : rank * each + (at + len(piece) + 4) // 5]
            for j in range(len(codes)):
                copy_eight(room, 5 * j, values, 8 * (256 * rank + np.int64(codes[j])))
            here = room[: len(piece)]
            for j in range(len(piece)):
                piece[j] += here[j]
        if divisor != 1:
            for j in range(len(piece)):
                piece[j] /= divisor
    return True


@kernel(read(f32), write(f32), i32, flag, u32, u32, write(u8))
def encode_powers(x, left, lowest, wide, k0, k1, out):
    """Encodes exponents, rounded at random. With `wide`, all of them, and the signs are sent apart; else those above `lowest`, 127 at most,
    with the sign in the top bit. Returns whether all of x is finite."""
    most = np.uint32(0)
    for at in range(0, len(x), L1_PIECE):
        end = min(at + L1_PIECE, len(x))
        piece, base, codes = x[at:end], np.uint32(k0 + at), out[at:end]
        for j in range(len(piece)):
            bits = magnitude(piece[j])
            most = max(most, bits)
            up = np.int32(np.uint32(bits & MANTISSA) > np.uint32(word(j, base, k1) >> S9))
            code = np.int32(np.int32(bits >> S23) + up)
            kept = min(max(np.int32(code - lowest), np.int32(0)), np.int32(127))
            codes[j] = min(code, np.int32(254)) if wide else np.int32(kept | (np.int32(128) if piece[j] < 0 else np.int32(0)))
        if len(left):
            rest = left[at:end]
            for j in range(len(rest)):
                code = np.uint32(codes[j])
                if not wide:
                    kept = np.uint32(code & np.uint32(127))
                    code = np.uint32(kept + np.uint32(lowest)) if kept else np.uint32(0)
                value = float_of(np.uint32(code << S23))
                rest[j] -= value if rest[j] >= 0 else -value
    return most < INFINITY


@kernel(write(f32), read(u8), read(u8), flag, f32)
def add_powers(total, codes, signs, first, divisor):
    """Adds to total_j 2^(code - 127), negative if the sign bit is 0 (with `first`, 0 + that), and divides in the end. Returns whether all
    codes are exponents of finite numbers."""
    room = np.empty(L1_PIECE, np.uint32)
    for at in range(0, len(total), L1_PIECE):
        end = min(at + L1_PIECE, len(total))
        piece, exponents, data = total[at:end], codes[at:end], signs[at // 8 :]
        most = np.uint8(0)
        for j in range(len(piece)):
            most = max(most, exponents[j])
        if most > 254:
            return False
        for b in range((len(piece) + 7) // 8):
            byte = np.uint32(~data[b])
            for bit in range(8):
                room[8 * b + bit] = np.uint32(np.uint32(byte << np.uint32(31 - bit)) & np.uint32(0x80000000))
        minus = room[: len(piece)]
        for j in range(len(piece)):
            value = float_of(np.uint32(np.uint32(np.uint32(exponents[j]) << S23) | minus[j]))
            piece[j] = (np.float32(0) if first else piece[j]) + value
        if divisor != 1:
            for j in range(len(piece)):
                piece[j] /= divisor
    return True


@kernel(read(f32), write(f32), read(f32), i64, read(u32), u32, read(f32), write(u8))
def encode_book(x, left, scales, block, table, lowest, book, out):
    """Encodes |x_j| / scales[j // block] as its place in the book, plus 128 if x_j < 0. `table` has the place by the upper 16 bits of
    the quotient, from `lowest` on (see u8bit). The look-ups have loops of their own, so that the others become vector instructions."""
    quotients, entries, values = np.empty(L1_PIECE, np.uint32), np.empty(L1_PIECE, np.uint32), np.empty(L1_PIECE, np.float32)
    for b in range(len(scales)):
        unit = scales[b] if scales[b] > 0 else np.float32(1)
        last = min((b + 1) * block, len(x))
        for at in range(b * block, last, L1_PIECE):
            end = min(at + L1_PIECE, last)
            piece, codes, q, entry = x[at:end], out[at:end], quotients[: end - at], entries[: end - at]
            for j in range(len(q)):
                q[j] = max(magnitude(piece[j] / unit), lowest) - lowest
            for j in range(len(q)):
                entry[j] = table[np.uint32(q[j] >> S16)]
            for j in range(len(q)):
                place = np.uint32(np.uint32(entry[j] + np.uint32(q[j] & LOW16)) >> S16)
                entry[j] = place
                codes[j] = place | (np.uint32(128) if piece[j] < 0 else np.uint32(0))
            if len(left):
                rest, sent = left[at:end], values[: end - at]
                for j in range(len(rest)):
                    sent[j] = book[entry[j]]
                for j in range(len(rest)):
                    value = sent[j] * scales[b]
                    rest[j] -= -value if rest[j] < 0 else value


@kernel(write(f32), read(u8), read(f32), read(f32), i64, flag, f32)
def add_book(total, codes, scales, book, block, first, divisor):
    """Adds to total_j book[code j] scales[j // block] (with `first`, 0 + that), and divides in the end."""
    for b in range(len(scales)):
        last = min((b + 1) * block, len(total))
        for at in range(b * block, last, L1_PIECE):
            end = min(at + L1_PIECE, last)
            piece, places = total[at:end], codes[at:end]
            for j in range(len(piece)):
                piece[j] = (np.float32(0) if first else piece[j]) + book[places[j]] * scales[b]
            if divisor != 1:
                for j in range(len(piece)):
                    piece[j] /= divisor
