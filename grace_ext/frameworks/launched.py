"""Joins the job that this process belongs to, whatever launched it, and gives its transport: for tools that do not train."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Afterwards, UnsupportedError
from ..exchange.transport import Transport
from . import launchers


@contextmanager
def transport() -> Iterator[Transport]:
    """Joins the job, yields its transport, and leaves the job at the end. The engine is Horovod or torch.distributed, as the torch wrapper
    chooses; without torch, Horovod for TensorFlow; under mpirun without Horovod, mpi4py. Raises UnsupportedError if none is installed."""
    horovod = importlib.util.find_spec("horovod") is not None
    by_mpi = any(name in os.environ for name in launchers.MPI) and "MASTER_ADDR" not in os.environ
    if by_mpi and not horovod and importlib.util.find_spec("mpi4py"):
        yield from _mpi()
    elif importlib.util.find_spec("torch"):
        yield from _torch()
    elif horovod:
        yield from _tensorflow()
    else:
        raise UnsupportedError("a probe needs an engine: install torch, Horovod or mpi4py, or state the link with --rate")


def _torch() -> Iterator[Transport]:
    import torch

    from .torch import engine
    from .torch.devices import ops_for

    engine.api.init()
    with Afterwards(engine.api.shutdown):
        yield engine.transport(ops_for(torch.device("cpu")), engine.api.global_process_set)


def _tensorflow() -> Iterator[Transport]:
    import horovod.tensorflow as hvd

    from .tensorflow.graph import HorovodTransport

    hvd.init()
    with Afterwards(hvd.shutdown):
        yield HorovodTransport(hvd.global_process_set)


def _mpi() -> Iterator[Transport]:
    from ..arrays.compiled import host_ops
    from ..arrays.numpy import NumpyOps
    from .numpy.mpi import MpiTransport, load_mpi

    yield MpiTransport(host_ops(NumpyOps), load_mpi().COMM_WORLD.Dup())
