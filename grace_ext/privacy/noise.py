"""Draws noise that nobody can predict or repeat."""

from __future__ import annotations

import os
from typing import NoReturn

import numpy as np

from ..errors import UnsupportedError


class Noise:
    """Draws random numbers whose key comes from the operating system, for one process.

    The key never follows from a seed, as every rank knows the seed and could subtract the noise. It cannot be copied or saved either: noise
    that is drawn again, by a resumed run or a forked process, would cancel in a difference of two messages.
    """

    def __init__(self) -> None:
        self._process = 0
        self._generator: np.random.Generator | None = None

    def _own(self) -> np.random.Generator:
        if self._generator is None or self._process != os.getpid():  # a forked process has a copy of its parent's key
            self._process = os.getpid()
            # numpy keys Philox by 128 bits. Torch's generator on a CPU has 2**32 streams, which can be tried out.
            self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(os.urandom(16), "little")))
        return self._generator

    def normals(self, count: int) -> np.ndarray:
        """Returns float64[count] of mean 0 and variance 1."""
        return self._own().standard_normal(count)

    def chosen(self, count: int, rate: float) -> np.ndarray:
        """Returns int64, ascending: the numbers below `count`, each with probability `rate`, independently."""
        return np.flatnonzero(self._own().random(count) < rate)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError("the noise of differential privacy cannot be copied or saved: drawn again, it would protect nothing")
