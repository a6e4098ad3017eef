"""Implements the array protocol for TensorFlow: its tensors at the border, numpy arrays inside.

Eager CPU tensors share memory with numpy. In graphs the same code runs in `tf.numpy_function` (see graph.py), whose inputs are live
TensorFlow memory: they are only read.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from ...arrays import kernels
from ...arrays.compiled import CompiledOps
from ...arrays.numpy import NumpyOps
from ...errors import UnsupportedError
from ...parts.tensor import TensorSpec

#: In bytes. tf.numpy_function passes on arrays that start at a multiple of it as they are, and copies all others.
ALIGNMENT = 64
#: In bytes. To copy a smaller array costs less than to avoid the copy.
SMALL = 1 << 14


def _libm() -> Any:
    return ctypes.CDLL("libm.so.6" if sys.platform == "linux" else None)


def _float_environment() -> Any:
    """Returns this thread's settings of floating-point arithmetic."""
    settings = ctypes.create_string_buffer(64)  # fenv_t has 32 bytes at most
    _libm().fegetenv(settings)
    return settings


#: The settings of threads that are not TensorFlow's.
USUAL = _float_environment()


@contextmanager
def subnormals_kept() -> Iterator[None]:
    """Lets this thread compute with subnormal numbers. TensorFlow's threads take them for zeros, and code in a graph would give other bits
    than the same code elsewhere."""
    before = _float_environment()
    _libm().fesetenv(USUAL)
    try:
        yield
    finally:
        _libm().fesetenv(before)


def numpy_function(function: Callable[..., Any], inputs: Sequence[Any], types: Sequence[Any]) -> list[tf.Tensor]:
    """Calls tf.numpy_function, for a function that computes (see `subnormals_kept`). Returns a list of its results, one for each type."""

    def run(*arrays: np.ndarray) -> Any:
        with subnormals_kept():
            return function(*arrays)

    results = tf.numpy_function(run, inputs, types)
    return results if isinstance(results, list) else [results]  # a single one, in eager code


class TensorFlowOps(NumpyOps):
    """Takes TensorFlow tensors and variables, or numpy arrays, and returns TensorFlow tensors."""

    def describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        if hasattr(tensor, "dtype") and isinstance(tensor.dtype, tf.DType):
            return tuple(tensor.shape), tensor.dtype.name
        return super().describe(tensor)

    def ingest(self, tensor: Any) -> np.ndarray:
        if isinstance(tensor, tf.IndexedSlices):
            tensor = tf.convert_to_tensor(tensor)
        if tf.is_tensor(tensor) and not hasattr(tensor, "numpy"):
            raise UnsupportedError("a symbolic tensor has no value to compress; in a tf.function use grace_ext.frameworks.tensorflow")
        return super().ingest(tensor.numpy() if hasattr(tensor, "numpy") else tensor)

    def emit(self, array: np.ndarray, spec: TensorSpec) -> Any:
        # TensorFlow copies it: simulated ranks may share the array. It is converted here, because tf.cast loses subnormal numbers.
        return tf.constant(super().emit(array, spec))


class GraphOps(NumpyOps):
    """Takes and returns numpy arrays, for code inside `tf.numpy_function`; bfloat16 ones are ml_dtypes arrays."""

    def lend(self, arrays: Sequence[np.ndarray]) -> None:
        """Takes note of the arrays that TensorFlow gets. It may keep them for any time, and write to one if nobody else has the tensor."""

    def take_back(self) -> None:
        """Lets the arrays that TensorFlow got in the last step be used again, if it has released them. Called at the start of a step."""


class CompiledGraphOps(GraphOps, CompiledOps):
    """Uses compiled kernels, and arrays that TensorFlow need not copy."""

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
            array = self.copy(array)  # else TensorFlow would copy it, to new memory
        return super().emit(array, spec)

    def lend(self, arrays: Sequence[np.ndarray]) -> None:
        self._lent += [root for array in arrays if self.owns(root := _root(array))]

    def take_back(self) -> None:
        self.recycle(self._lent)


def graph_ops() -> GraphOps:
    return CompiledGraphOps() if kernels.enabled() else GraphOps()


def aligned(count: int, dtype: str) -> np.ndarray:
    """Returns a new array, not set, that tf.numpy_function passes on without a copy if it is not small. It is no view of another array."""
    size = count * np.dtype(dtype).itemsize
    if size < SMALL:
        return np.empty(count, dtype)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return np.frombuffer(memoryview(memory)[start : start + size], dtype)


def _root(array: np.ndarray) -> np.ndarray:
    """Returns the array that owns the memory of this one."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
