"""The array protocol for TensorFlow: its tensors at the border, numpy arrays inside.

Eager CPU tensors share memory with numpy. In graphs the same code runs in `tf.numpy_function` (see graph.py), whose inputs are live
TensorFlow memory: they are only read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ...errors import UnsupportedError
from ...spec import TensorSpec
from ..numpy.ops import NumpyOps, saturated


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
