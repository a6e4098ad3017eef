"""The counter-based generator of grace_ext/rng.py, word by word, without a pass of its own."""

from __future__ import annotations

import numpy as np

from ..rng import MULTIPLIER_1, MULTIPLIER_2
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
