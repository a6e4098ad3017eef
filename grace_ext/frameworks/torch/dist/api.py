"""The public names of horovod.torch over torch.distributed, except DistributedOptimizer.

A script written for `import horovod.torch as hvd` runs under torchrun, or as a single rank under plain python, where every collective
returns a copy of its input. Collectives run over Gloo for CPU tensors and over NCCL for CUDA tensors, unless the script has initialized
torch.distributed before hvd.init().

One rule is stricter than Horovod's: torch.distributed pairs collectives by order, so all ranks must start the same collectives in the same
order. Ranks that start different ones (name, kind, op, root_rank, dtype, device, shape) get the same HorovodInternalError: at once if one
of the collectives is new, else at most 64 collectives later. Starting a collective never waits for other ranks.

What torch.distributed cannot do (Adasum, join, elastic, timelines) raises grace_ext.errors.UnsupportedError when it is used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .handles import poll, synchronize
from .model import SyncBatchNorm, allgather_object, broadcast_object, broadcast_optimizer_state, broadcast_parameters
from .move import (
    allgather,
    allgather_async,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    grouped_allgather,
    grouped_allgather_async,
)
from .pieces import Adasum, Average, Max, Min, Product, Sum
from .reduce import (
    Compression,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    reducescatter,
    reducescatter_async,
    sparse_allreduce_async,
)
from .world import (
    HorovodInternalError,
    ProcessSet,
    add_process_set,
    cross_rank,
    cross_size,
    elastic,
    global_process_set,
    init,
    is_initialized,
    join,
    local_rank,
    local_size,
    rank,
    remove_process_set,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "HorovodInternalError",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "elastic",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
]


def mpi_threads_supported() -> bool:
    """Raises ValueError, as Horovod without MPI does."""
    raise ValueError("MPI is not used: this API runs over torch.distributed")


def mpi_enabled() -> bool:
    """Returns False: MPI is not used."""
    return False


def mpi_built() -> bool:
    """Returns False: MPI is not used."""
    return False


def gloo_enabled() -> bool:
    """Whether collectives of CPU tensors can run over Gloo."""
    return gloo_built()


def gloo_built() -> bool:
    """Whether this PyTorch has Gloo."""
    return dist.is_available() and dist.is_gloo_available()


def nccl_built() -> int:
    """Returns the NCCL version of this PyTorch as one number (2.21.5 is 22105); 0 if it has none."""
    if not (dist.is_available() and dist.is_nccl_available()):
        return 0
    major, minor, patch = torch.cuda.nccl.version()[:3]
    return major * 10000 + minor * 100 + patch


def ddl_built() -> bool:
    """Returns False: IBM DDL is not used."""
    return False


def ccl_built() -> bool:
    """Returns False: oneCCL is not used."""
    return False


def cuda_built() -> bool:
    """Whether this PyTorch was built for CUDA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether this PyTorch was built for ROCm."""
    return torch.version.hip is not None
