"""Tells users whose variables are on a GPU what it costs that TensorFlow's exchange runs on the host."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from ...parts.tensor import TensorSpec
from .variables import variable_of

LOG = logging.getLogger("grace_ext")
NOTICE = (
    "%d of %d variables are on a %s device, but with TensorFlow grace_ext compresses on the CPU (in tf.numpy_function): each %s to the "
    "host and %.4g MB back. `grace-ext plan MODEL --host-copy RATE` predicts whether compression pays nevertheless. If it does not, train "
    "with PyTorch (grace_ext.frameworks.torch compresses on the GPU), choose a compressor that costs the CPU less (`grace-ext bench`), or, "
    "if the network is fast, use the tape and Compression.fp16 of horovod.tensorflow itself, over tf.Variables: these leave gradients on "
    "the GPU if Horovod was built with NCCL (docs/tensorflow.md)"
)
#: What is copied at once, with the number of MB.
GRADIENTS, EXAMPLES = "exchange copies %.4g MB of gradients", "exchange copies %.4g MB of gradients per example"
MODEL = "synchronization copies %.4g MB of the model"
#: The notices that this process has logged: one at most.
_told: list[str] = []


def device_type(variable: Any) -> str:
    """Returns the type of the device that holds this variable, such as 'CPU' or 'GPU'. In a graph, gradients have no device yet."""
    return tf.DeviceSpec.from_string(variable_of(variable).device or "").device_type or "CPU"


def mention_host_copies(specs: Iterable[TensorSpec], variables: Sequence[Any], rank: int, what: str = GRADIENTS) -> None:
    """Logs NOTICE on rank 0, once per process, if some of these variables, which the specs describe, are not on the CPU.

    It is no warning, which could be an error: variables may be placed otherwise on another rank, which would wait for this one."""
    elsewhere = [(spec.nbytes, found) for spec, v in zip(specs, variables, strict=True) if (found := device_type(v)) != "CPU"]
    if not elsewhere or rank != 0 or _told:
        return
    mb = sum(nbytes for nbytes, _ in elsewhere) / 1e6
    _told.append(NOTICE % (len(elsewhere), len(variables), elsewhere[0][1], what % mb, mb))
    LOG.warning(_told[0])
