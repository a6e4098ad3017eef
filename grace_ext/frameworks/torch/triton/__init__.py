"""Triton kernels for torch tensors on a GPU. Nothing here imports Triton before the first tensor on a GPU asks for operations.

TensorFlow imported before Triton can end the process, because both register the options of LLVM.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ..ops import TorchOps


def device_ops(device: torch.device) -> TorchOps:
    """Returns the operations for tensors of this device, which is no CPU: with Triton kernels on a GPU of torch's (CUDA or ROCm), if
    Triton is installed and GRACE_EXT_KERNELS is not 0; else plain ones. Both give the same bytes."""
    wanted = device.type == "cuda" and torch.cuda.is_available() and os.environ.get("GRACE_EXT_KERNELS", "1") != "0"
    if not wanted or importlib.util.find_spec("triton") is None:
        return TorchOps(device)
    from .ops import TritonOps

    return TritonOps(device)
