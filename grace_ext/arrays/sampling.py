"""Draws positions without replacement: k of d, in O(k), the same on every rank that has the key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..parts.rng import FEISTEL_ROUNDS, Key, mix, words
from . import kernels
from .kernels.sizes import FEW

#: The most bytes of positions that are kept beside the newest array: those of one step, of several buckets at a few per cent.
RECENT_BYTES = 64 * 2**20
#: About what an array takes beside its positions.
OVERHEAD = 256


class _Recent:
    """Holds the arrays that were used last, as many as have room in RECENT_BYTES, and the newest always."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[Any, np.ndarray] = OrderedDict()  # the one that was used last comes last
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, key: Any) -> np.ndarray | None:
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
            return self._arrays.get(key)

    def put(self, key: Any, array: np.ndarray) -> None:
        with self._lock:
            if key in self._arrays:  # another thread was faster
                return
            self._arrays[key] = array
            self.nbytes += array.nbytes + OVERHEAD
            while self.nbytes > RECENT_BYTES and len(self._arrays) > 1:
                self.nbytes -= self._arrays.popitem(last=False)[1].nbytes + OVERHEAD


recent = _Recent()


def sample(key: Key, d: int, k: int) -> np.ndarray:
    """Returns int64[k], ascending and read-only: k distinct positions of d, every k-subset about equally likely, in O(k).

    Of up to FEW elements, those with the k largest of d words are chosen. Otherwise the positions are the images of 0..k-1 under a keyed
    permutation of [0, d): a Feistel network over the next even power of two, applied again to whatever falls outside (cycle walking), which
    keeps it a permutation. The encoder, and the decoder for each rank, need the same positions in the same step, of all tensors, so those
    of the last RECENT_BYTES are kept."""
    found = recent.get((key, d, k))
    if found is None:
        found = np.arange(d, dtype=np.int64) if k >= d else np.sort(_permuted(key, d, k))
        found.flags.writeable = False  # all callers get the same array
        recent.put((key, d, k), found)
    return found


def sample_each(keys: Sequence[Key], sizes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Returns int64: what `sample` gives for each key, size and count, as positions in arrays of these sizes, end to end. Uses kernels."""
    positions, halves = np.empty(sum(counts), np.int64), np.array([_half_bits(d) for d in sizes])
    compiled: Any = kernels.load()
    compiled.permuted_each(np.array(keys, np.uint32).reshape(-1), halves, np.array(sizes), np.array(counts), positions)
    positions.sort()  # the positions of each array are above those of all before it
    return positions


def _half_bits(d: int) -> int:
    """Returns the number of bits of each half of the numbers that the Feistel network permutes; all numbers below d fit."""
    return max(1, ((d - 1).bit_length() + 1) // 2)


def _permuted(key: Key, d: int, k: int) -> np.ndarray:
    half_bits = _half_bits(d)
    if kernels.enabled() and (compiled := kernels.load()):
        out = np.empty(k, np.int64)
        compiled.permuted(np.uint32(key[0]), np.uint32(key[1]), half_bits, d, out)
        return out
    if d <= FEW:
        keys = words(key, d).astype(np.int64) << 8 | np.arange(d)[::-1]  # of equal words the first is the largest
        return np.argsort(keys)[d - k :]
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
