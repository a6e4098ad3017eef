"""The counter-based generator of grace_ext/rng.py, word by word, without a pass of its own."""

from __future__ import annotations

import numpy as np

from ..rng import FEISTEL_ROUNDS, MULTIPLIER_1, MULTIPLIER_2
from .compile import i64, inlined, kernel, u32, write

M1, M2, S15, S16 = np.uint32(MULTIPLIER_1), np.uint32(MULTIPLIER_2), np.uint32(15), np.uint32(16)


@inlined
def mix(x):
    """The finaliser of rng.mix."""
    x = np.uint32((x ^ (x >> S16)) * M1)  # integers are widened to 64 bits by every operation
    x = np.uint32((x ^ (x >> S15)) * M2)
    return np.uint32(x ^ (x >> S16))


@inlined
def word(j, k0, k1):
    """Word j of the stream with key (k0, k1)."""
    return mix(np.uint32(mix(np.uint32(np.uint32(j) + k0)) ^ k1))


@kernel(u32, u32, write(i64))
def random_words(k0, k1, out):
    """rng.words((k0, k1), len(out))."""
    for j in range(len(out)):
        out[j] = word(j, k0, k1)


@kernel(u32, u32, i64, i64, write(i64))
def permuted(k0, k1, half, d, out):
    """The images of 0, 1, ... under the keyed permutation of [0, d) of rng.sample, a Feistel network over 2 * half bits."""
    mask = np.uint32((1 << half) - 1)
    for j in range(len(out)):
        x = j
        while True:
            left, right = np.uint32(x >> half), np.uint32(x & mask)
            for turn in range(FEISTEL_ROUNDS):
                scrambled = mix(np.uint32(mix(np.uint32(right + np.uint32(k0 + np.uint32(turn * 0x9E3779B9)))) ^ k1))
                left, right = right, np.uint32((left ^ scrambled) & mask)
            x = (np.int64(left) << half) | np.int64(right)
            if x < d:
                break
        out[j] = x
