"""Finds the array operations of a tensor library by its name.

The classes for torch and TensorFlow live with their frameworks and are imported only when asked for, by the names in CLASSES.
"""

from __future__ import annotations

import importlib

from ..errors import ParameterError, shown
from ..parts.ops import Ops
from .compiled import host_ops

#: By framework: the module and the name of its class for tensors on the host.
CLASSES = {
    "numpy": ("grace_ext.arrays.numpy", "NumpyOps"),
    "torch": ("grace_ext.frameworks.torch.ops", "HostOps"),
    "tensorflow": ("grace_ext.frameworks.tensorflow.ops", "TensorFlowOps"),
}


def ops_for_framework(framework: str) -> Ops:
    """Returns the operations for tensors of this framework on the host. Raises ParameterError for an unknown framework."""
    if not isinstance(framework, str) or framework not in CLASSES:
        raise ParameterError(f"framework must be 'numpy', 'torch' or 'tensorflow', got {shown(framework)}")
    module, name = CLASSES[framework]
    return host_ops(getattr(importlib.import_module(module), name))
