"""Chooses the array operations for tensors of a device."""

from __future__ import annotations

import importlib.util
import os

import torch

from ...arrays.compiled import host_ops
from .ops import HostOps, TorchOps

#: The oldest Triton with which the kernels are tested.
OLDEST_TRITON = (3, 6)


def ops_for(device: torch.device) -> HostOps | TorchOps:
    """Returns the implementation for tensors of this device; all give the same bytes.

    On GPUs of CUDA or ROCm it has Triton kernels, if a Triton that is not too old is installed and GRACE_EXT_KERNELS is not 0. Only then is
    Triton imported here: TensorFlow imported before it may end the process, because both register the options of LLVM."""
    if device.type == "cpu":
        return host_ops(HostOps)
    wanted = device.type == "cuda" and torch.cuda.is_available() and os.environ.get("GRACE_EXT_KERNELS", "1") != "0"
    if not wanted or importlib.util.find_spec("triton") is None:
        return TorchOps(device)
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return TorchOps(device)
    from .triton.ops import TritonOps

    return TritonOps(device)
