"""The array protocol for TensorFlow: its tensors at the border, numpy arrays inside.

Eager CPU tensors share memory with numpy. In graphs the same code runs in `tf.numpy_function` (see graph.py), whose inputs are live
TensorFlow memory: they are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ...arrays import kernels
from ...arrays.compiled import CompiledOps
from ...arrays.numpy import NumpyOps, saturated
from ...errors import UnsupportedError
from ...parts.tensor import TensorSpec

#: Bytes. tf.numpy_function hands over arrays that start at a multiple of it as they are, and copies all others.
ALIGNMENT = 64
#: Bytes under which a copy costs less than to avoid it.
SMALL = 1 << 14


class TensorFlowOps(NumpyOps):
    """TensorFlow tensors and variables, or numpy arrays, in; TensorFlow tensors out."""

    def describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        if hasattr(tensor, "dtype") and isinstance(tensor.dtype, tf.DType):
            return tuple(tensor.shape), tensor.dtype.name
        return super().describe(tensor)

    def ingest(self, tensor: Any) -> np.ndarray:
        if isinstance(tensor, tf.IndexedSlices):
            tensor = tf.convert_to_tensor(tensor)
        if tf.is_tensor(tensor) and not hasattr(tensor, "numpy"):
            raise UnsupportedError("a symbolic tensor cannot be compressed here; in a tf.function use grace_ext.frameworks.tensorflow")
        return super().ingest(tensor.numpy() if hasattr(tensor, "numpy") else tensor)

    def emit(self, array: np.ndarray, spec: TensorSpec) -> Any:
        # Converted by TensorFlow, which copies: the array may be shared by simulated ranks.
        return tf.cast(tf.reshape(tf.constant(saturated(array, spec.dtype)), spec.shape), spec.dtype)


class GraphOps(NumpyOps):
    """numpy on both sides, for code inside `tf.numpy_function`; 16-bit floats come and go as ml_dtypes arrays."""

    def lend(self, arrays: Sequence[np.ndarray]) -> None:
        """Called with what TensorFlow gets: it keeps this as long as it likes, and writes to it where nobody else has the tensor."""

    def take_back(self) -> None:
        """Called at the start of a step: what TensorFlow got in the last one may be used again, where it has let go of it."""


class CompiledGraphOps(GraphOps, CompiledOps):
    """With compiled kernels, and with arrays that TensorFlow need not copy."""

    def __init__(self) -> None:
        super().__init__()
        self._lent: list[np.ndarray] = []

    def new(self, size: int, dtype: str) -> np.ndarray:
        return aligned(size, dtype)

    def copy(self, x: np.ndarray) -> np.ndarray:
        if x.dtype != np.float32 or x.ndim != 1:
            return super().copy(x)
        out = self.empty(x.size)
        out[:] = x
        return out

    def emit(self, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
        if spec.dtype == "float32" and array.dtype == np.float32 and array.ctypes.data % ALIGNMENT and array.nbytes >= SMALL:
            array = self.copy(array)  # TensorFlow would, to new memory
        return super().emit(array, spec)

    def lend(self, arrays: Sequence[np.ndarray]) -> None:
        self._lent += [root for array in arrays if self.owns(root := _root(array))]

    def take_back(self) -> None:
        self.recycle(self._lent)


def graph_ops() -> GraphOps:
    return CompiledGraphOps() if kernels.enabled() else GraphOps()


def aligned(count: int, dtype: str) -> np.ndarray:
    """A new array, not set, that tf.numpy_function hands over without a copy, where it is not small. It is no view of another array."""
    size = count * np.dtype(dtype).itemsize
    if size < SMALL:
        return np.empty(count, dtype)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return np.frombuffer(memoryview(memory)[start : start + size], dtype)


def _root(array: np.ndarray) -> np.ndarray:
    """The array that this one is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
