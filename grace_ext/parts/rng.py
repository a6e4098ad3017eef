"""The one random generator: counter-based, in 32-bit integer operations, so that numpy, torch and TensorFlow agree bit for bit.

Word i of the stream with key (k0, k1) is  mix(mix(i + k0) ^ k1)  modulo 2**32, where mix is the 32-bit finaliser
    x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16.
Nothing has a state and nothing touches a global generator. Keys come from `StepInfo.shared_key` and `.private_key`.

What is drawn here on the host is small (k indices, a PowerSGD factor); bulk words, one per element, come from `Ops.random_words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Key = tuple[int, int]
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B
FEISTEL_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser, in place, on a uint32 array."""
    import numpy as np

    x ^= x >> np.uint32(16)
    x *= np.uint32(MULTIPLIER_1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(MULTIPLIER_2)
    x ^= x >> np.uint32(16)
    return x


def words(key: Key, count: int, start: int = 0) -> np.ndarray:
    """uint32[count]: words start, start + 1, ... of the stream."""
    import numpy as np

    x = np.arange(start, start + count, dtype=np.int64).astype(np.uint32)
    x += np.uint32(key[0])
    x = mix(x)
    x ^= np.uint32(key[1])
    return mix(x)


@lru_cache(maxsize=256)  # the encoder, and the decoder for each rank, want the same positions in the same step, of all tensors
def sample(key: Key, d: int, k: int) -> np.ndarray:
    """int64[k], ascending and read-only: k distinct positions of d, every k-subset about equally likely, in O(k).

    The positions are the images of 0..k-1 under a keyed permutation of [0, d): a Feistel network over the next even power of
    two, applied again to whatever falls outside (cycle walking), which keeps it a permutation."""
    import numpy as np

    if k >= d:
        return np.arange(d, dtype=np.int64)
    positions = np.sort(_permuted(key, d, k))
    positions.flags.writeable = False  # shared by all who ask
    return positions


def sample_each(keys: Sequence[Key], sizes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """int64: what `sample` gives for each key, size and count, as positions in arrays of these sizes laid end to end. By kernels."""
    import numpy as np

    from .. import kernels

    positions, halves = np.empty(sum(counts), np.int64), np.array([_half_bits(d) for d in sizes])
    words = np.array(keys, np.uint32).reshape(-1)
    kernels.load().permuted_each(words, halves, np.array(sizes), np.array(counts), positions)
    positions.sort()  # those of each array are above those of all before it
    return positions


def _half_bits(d: int) -> int:
    """Of each half of the numbers that the Feistel network takes: at least those below d."""
    return max(1, ((d - 1).bit_length() + 1) // 2)


def _permuted(key: Key, d: int, k: int) -> np.ndarray:
    import numpy as np

    from .. import kernels

    half_bits = _half_bits(d)
    if kernels.enabled():
        out = np.empty(k, np.int64)
        kernels.load().permuted(np.uint32(key[0]), np.uint32(key[1]), half_bits, d, out)
        return out
    half, mask = np.uint32(half_bits), np.uint32((1 << half_bits) - 1)

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = (x >> half).astype(np.uint32), (x & mask).astype(np.uint32)
        for turn in range(FEISTEL_ROUNDS):
            scrambled = mix(mix(right + np.uint32((key[0] + turn * 0x9E3779B9) & 0xFFFFFFFF)) ^ np.uint32(key[1]))
            left, right = right, (left ^ scrambled) & mask
        return (left.astype(np.uint64) << np.uint64(half_bits)) | right

    x = permute(np.arange(k, dtype=np.uint64))
    outside = np.flatnonzero(x >= d)
    while outside.size:
        x[outside] = permute(x[outside])
        outside = outside[x[outside] >= d]
    return x.astype(np.int64)


def normals(key: Key, count: int) -> np.ndarray:
    """float32[count] of mean 0 and variance 1, close to normal: the sum of eight 16-bit uniforms, exact in integers, so that
    ranks on different processors and libraries start from the same bits."""
    import numpy as np

    raw = words(key, 4 * count).reshape(count, 4)
    total = ((raw & np.uint32(0xFFFF)).astype(np.int64) + (raw >> np.uint32(16))).sum(axis=1)
    mean, deviation = 8 * 65535 / 2, (8 * (65536**2 - 1) / 12) ** 0.5
    return ((total - mean) / deviation).astype(np.float32)
