"""Computes the words of the counter-based generator of parts/rng.py, one at a time, without a pass of their own."""

from __future__ import annotations

import numpy as np

from ...parts.rng import FEISTEL_ROUNDS, MULTIPLIER_1, MULTIPLIER_2, SETTLING
from .compile import bits_of, f64, i64, inlined, kernel, read, u32, write
from .elementwise import L1_PIECE
from .sizes import FEW

M1, M2, S15, S16 = np.uint32(MULTIPLIER_1), np.uint32(MULTIPLIER_2), np.uint32(15), np.uint32(16)
#: What `above_zero` returns for 1.
ONE = np.uint32(0x3F800000 - 1)


@inlined
def mix(x):
    """Returns rng.mix(x), the finaliser."""
    x = np.uint32((x ^ (x >> S16)) * M1)  # numba widens integers to 64 bits in every operation
    x = np.uint32((x ^ (x >> S15)) * M2)
    return np.uint32(x ^ (x >> S16))


@inlined
def word(j, k0, k1):
    """Returns word j of the stream with key (k0, k1)."""
    return mix(np.uint32(mix(np.uint32(np.uint32(j) + k0)) ^ k1))


@inlined
def above_zero(gap):
    """Returns uint32, below ONE exactly if 0 < gap < 1: a draw is less than one below what is expected, and only `settled` can tell."""
    return np.uint32(bits_of(gap) - np.uint32(1))


@kernel(f64, u32, u32, u32)
def settled(chance, j, k0, k1):
    """Returns what rng.settled does, for one draw, at position j."""
    turn, rest = np.uint32(0), chance * 2.0**32
    while rest > 0:
        turn = np.uint32(turn + np.uint32(SETTLING))
        whole, draw = np.floor(rest), np.float64(word(j, k0, np.uint32(k1 ^ turn)))
        if draw != whole:
            return draw < whole
        rest = (rest - whole) * 2.0**32
    return False


@kernel(u32, u32, write(i64))
def random_words(k0, k1, out):
    """Writes rng.words((k0, k1), len(out)) to `out`."""
    for j in range(len(out)):
        out[j] = word(j, k0, k1)


@kernel(u32, u32, i64, write(i64))
def scramble(k0, k1, half, x):
    """Replaces each of x, numbers of 2 * half bits, by its image under a keyed Feistel network."""
    mask, shift = np.uint32((1 << half) - 1), np.uint32(half)
    left, right = np.empty(L1_PIECE, np.uint32), np.empty(L1_PIECE, np.uint32)
    for start in range(0, len(x), L1_PIECE):
        piece = x[start : start + L1_PIECE]
        lefts, rights = left[: len(piece)], right[: len(piece)]
        for j in range(len(piece)):
            lefts[j], rights[j] = np.uint32(piece[j] >> np.int64(shift)), np.uint32(np.uint32(piece[j]) & mask)
        for turn in range(FEISTEL_ROUNDS):
            key = np.uint32(k0 + np.uint32(turn * 0x9E3779B9))
            for j in range(len(piece)):
                scrambled = mix(np.uint32(mix(np.uint32(rights[j] + key)) ^ k1))
                old = lefts[j]
                lefts[j] = rights[j]
                rights[j] = np.uint32(np.uint32(old ^ scrambled) & mask)
        for j in range(len(piece)):
            piece[j] = (np.int64(lefts[j]) << np.int64(shift)) | np.int64(rights[j])


@kernel(u32, u32, i64, i64, write(i64))
def permuted(k0, k1, half, d, out):
    """Writes the images of 0, 1, ... under the keyed permutation of [0, d) of sampling.sample: what falls outside is scrambled again. Of a
    few elements, chooses those with the largest words."""
    if d <= FEW:
        keys, found = np.empty(d, np.int64), 0
        for j in range(d):
            keys[j] = np.int64(word(j, k0, k1)) << 8 | (d - 1 - j)
        for j in range(d):
            above = 0
            for i in range(d):
                above += keys[i] > keys[j]
            if above < len(out):
                out[found] = j
                found += 1
        return
    for j in range(len(out)):
        out[j] = j
    scramble(k0, k1, half, out)
    outside, again = np.empty(L1_PIECE, np.int64), np.empty(L1_PIECE, np.int64)
    for start in range(0, len(out), L1_PIECE):
        piece, count = out[start : start + L1_PIECE], 0
        for j in range(len(piece)):
            outside[count] = j
            count += piece[j] >= d
        while count:
            for j in range(count):
                again[j] = piece[outside[j]]
            scramble(k0, k1, half, again[:count])
            left = 0
            for j in range(count):
                piece[outside[j]] = again[j]
                outside[left] = outside[j]
                left += again[j] >= d
            count = left


@kernel(read(u32), read(i64), read(i64), read(i64), write(i64))
def permuted_each(keys, halves, sizes, counts, out):
    """Does permuted for each size, with two words of the keys and `counts` images each, as positions in arrays of these sizes laid end to
    end."""
    at, start = 0, 0
    for t in range(len(sizes)):
        mine = out[at : at + counts[t]]
        permuted(keys[2 * t], keys[2 * t + 1], halves[t], sizes[t], mine)
        for j in range(len(mine)):
            mine[j] += start
        at, start = at + counts[t], start + sizes[t]
