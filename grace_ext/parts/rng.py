"""Generates all random numbers: counter-based, in 32-bit integer operations, so that numpy, torch and TensorFlow agree bit for bit.

Word i of the stream with key (k0, k1) is  mix(mix(i + k0) ^ k1)  modulo 2**32, where mix is the 32-bit finaliser
    x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16.
Nothing has a state and nothing touches a global generator. Keys come from `StepInfo.shared_key` and `.private_key`.

Only a few numbers are drawn here on the host (k indices, a PowerSGD factor); words in bulk, one per element, come from `Ops.random_words`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Key = tuple[int, int]
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B
FEISTEL_ROUNDS = 6
SETTLING = 0x9E3779B9


def mix(x: np.ndarray) -> np.ndarray:
    """Applies the finaliser to a uint32 array, in place, and returns it."""
    import numpy as np

    x ^= x >> np.uint32(16)
    x *= np.uint32(MULTIPLIER_1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(MULTIPLIER_2)
    x ^= x >> np.uint32(16)
    return x


def words(key: Key, count: int, start: int = 0) -> np.ndarray:
    """Returns words start, start + 1, ... of the stream, uint32[count]."""
    import numpy as np

    x = np.arange(start, start + count, dtype=np.int64).astype(np.uint32)
    x += np.uint32(key[0])
    x = mix(x)
    x ^= np.uint32(key[1])
    return mix(x)


def settled(key: Key, positions: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Returns bool[m]: whether draws succeed that their own word left undecided, float64 `chances` remaining. Each takes further words, of
    the streams with keys (k0, k1 ^ SETTLING), (k0, k1 ^ 2 SETTLING), ... at its position, until one decides: chances are exact."""
    import numpy as np

    decided, rest, turn = np.zeros(len(chances), bool), chances.astype(np.float64) * 2.0**32, 0
    left = np.flatnonzero(rest)
    while len(left):
        turn = turn + SETTLING & 0xFFFFFFFF
        whole = np.floor(rest[left])
        draws = mix(mix(positions[left].astype(np.uint32) + np.uint32(key[0])) ^ np.uint32(key[1] ^ turn)).astype(np.float64)
        decided[left] = draws < whole
        rest[left] = (rest[left] - whole) * 2.0**32
        left = left[(draws == whole) & (rest[left] > 0)]
    return decided


def normals(key: Key, count: int) -> np.ndarray:
    """Returns float32[count] of mean 0 and variance 1, close to normal: each is the sum of eight 16-bit uniforms, exact in integers, so
    that ranks on different processors and libraries start from the same bits."""
    import numpy as np

    raw = words(key, 4 * count).reshape(count, 4)
    total = ((raw & np.uint32(0xFFFF)).astype(np.int64) + (raw >> np.uint32(16))).sum(axis=1)
    mean, deviation = 8 * 65535 / 2, (8 * (65536**2 - 1) / 12) ** 0.5
    return np.asarray((total - mean) / deviation, np.float32)
