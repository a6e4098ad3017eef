"""Rejects uses of the wrappers that cannot be right, because something else already exchanges, shards or changes the gradients."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ...driver.layout import check_names
from ...errors import NamesError, ParameterError, UnsupportedDtypeError, UnsupportedError
from .. import launchers
from .in_front import InFront

FSDP = (
    "parameter {!r} belongs to a module in FullyShardedDataParallel (FSDP1), which flattens parameters and reduce-scatters gradients, so "
    "they cannot be compressed. Shard with torch.distributed.fsdp.fully_shard (FSDP2), and compress between the replicas of the model "
    "with hvd.fsdp_hook; or use DistributedDataParallel"
)
FULLY_SHARDED = (
    "parameter {!r} is a DTensor, which fully_shard (FSDP2) has sharded over mesh {}, and here whole gradients are compressed. Shard each "
    "replica of the model over a mesh of its own, compress between the replicas with hvd.fsdp_hook(g, model, mesh['replicate'], "
    "optimizer), and step the plain optimizer"
)
TENSOR_PARALLEL = (
    "parameter {!r} is a DTensor, placed as {} over mesh {} by tensor parallelism, so no rank has its whole gradient. To compress between "
    "replicas of a tensor-parallel model, call fully_shard(model, mesh=mesh['shard']) as well (a mesh of one rank will "
    "do), and then hvd.fsdp_hook(g, model, mesh['replicate'], optimizer)"
)
IN_DDP = (
    "this model is wrapped in DistributedDataParallel, which all-reduces every gradient uncompressed during backward(); {} would exchange "
    "the mean once more. Compress inside DDP: model.register_comm_hook(*hvd.ddp_comm_hook(g, model, optimizer)), and step the plain "
    "optimizer. Or leave DDP out"
)
IN_DATA_PARALLEL = (
    "this model is wrapped in torch.nn.DataParallel, which drives several devices from one process; {} exchanges the gradients of one "
    "device per process. Leave DataParallel out, and start one process per device (torchrun, horovodrun)"
)
PRIVATE = (
    "{}, so what trains is not the gradient that backward() leaves in .grad: the private gradient is made in the optimizer's step, after "
    "the exchange. Differential privacy with compression needs the noise before the exchange: leave Opacus' optimizer out, and use "
    "hvd.DistributedOptimizer(privacy=hvd.Privacy(unit='example', ...))"
)


def check_optimizer_kind(optimizer: Any, wrapper: str) -> None:
    """Raises an error if `wrapper` cannot stand in front of this optimizer: it is none, or it exchanges or changes gradients itself."""
    if isinstance(optimizer, torch.nn.Module):
        raise ParameterError(
            f"hvd.{wrapper} takes a torch optimizer first, and got the module {type(optimizer).__name__}: pass "
            "torch.optim.SGD(model.parameters(), lr=...), and named_parameters=model.named_parameters()"
        )
    if hasattr(optimizer, "noise_multiplier") and hasattr(optimizer, "pre_step"):
        raise UnsupportedError(PRIVATE.format(f"{type(optimizer).__name__} clips and adds noise (Opacus)"))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ParameterError(f"hvd.{wrapper} takes a torch.optim.Optimizer first, and got {type(optimizer).__name__}")
    if isinstance(optimizer, InFront) or "_allreduce_delay" in vars(optimizer):
        raise UnsupportedError(
            f"this optimizer ({type(optimizer).__name__}) exchanges gradients or models already; hvd.{wrapper} around it would exchange "
            "them twice. Wrap the plain optimizer, once"
        )
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise UnsupportedError(
            f"ZeroRedundancyOptimizer gives each rank the update of a part of the model, so hvd.{wrapper} cannot stand in front of it. "
            "Wrap the model in DistributedDataParallel, compress with hvd.ddp_comm_hook, and step the ZeroRedundancyOptimizer itself"
        )


def check_parameters(pairs: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters by name, which is the same whether the model was compiled or not. Raises NamesError, UnsupportedDtypeError or
    UnsupportedError if their gradients cannot be exchanged."""
    pairs = list(pairs)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise NamesError("named_parameters must be (name, parameter) tuples, usually model.named_parameters()")
    pairs = [(name_of(name) if isinstance(name, str) else name, parameter) for name, parameter in pairs]
    check_names(name for name, _ in pairs)
    for name, parameter in pairs:
        kind = type(parameter).__name__
        if kind == "FlatParameter" or getattr(parameter, "_is_flat_param", False) or "_fsdp_wrapped_module" in name:
            raise UnsupportedError(FSDP.format(name))
        if is_dtensor(parameter):
            raise UnsupportedError(_why_a_dtensor(name, parameter))
        if parameter.is_complex():
            raise UnsupportedDtypeError(
                f"parameter {name!r} is {parameter.dtype}; grace_ext compresses real gradients: keep its real and imaginary parts in one "
                "real parameter, and use torch.view_as_complex(parameter) in forward()"
            )
    if len({p.device for _, p in pairs}) > 1:
        raise UnsupportedError("the parameters are on several devices; grace_ext compresses the gradients of one device per process")
    return dict(pairs)


def name_of(path: str) -> str:
    """Returns a parameter's name, which is the same whether modules are compiled or not."""
    return path.replace("_orig_mod.", "")


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor. (By name, because an import of torch.distributed.tensor takes seconds.)"""
    return type(tensor).__name__ == "DTensor"


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a DTensor, which shares its memory; another tensor as it is."""
    with torch.no_grad():
        return cast(Any, tensor).to_local() if is_dtensor(tensor) else tensor


def _why_a_dtensor(name: str, parameter: Any) -> str:
    """Says who has made a DTensor of this parameter. Searches all objects of the process."""
    shape = tuple(parameter.device_mesh.shape)
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in [found for found in gc.get_objects() if issubclass(type(found), kind)]:
        if any(p is parameter for p in module.parameters()):
            return FULLY_SHARDED.format(name, shape)
    return TENSOR_PARALLEL.format(name, parameter.placements, shape)


def check_containers(parameters: Mapping[str, torch.nn.Parameter], wrapper: str, ranks: Iterable[int] | None = None) -> None:
    """Raises UnsupportedError if a living DDP or DataParallel module holds one of these parameters. Searches all objects of the process, so
    call it once.

    ranks: the job's ranks among which `wrapper` exchanges models; a DDP that shares only this rank with them is right (DDP inside a node,
    local steps between nodes). None: no DDP is right."""
    mine = {id(p) for p in parameters.values()}
    among = None if ranks is None else set(ranks)
    for module in [found for found in gc.get_objects() if issubclass(type(found), (DistributedDataParallel, DataParallel))]:
        if not any(id(p) in mine for p in module.parameters()):
            continue
        if isinstance(module, DataParallel):
            raise UnsupportedError(IN_DATA_PARALLEL.format(wrapper))
        theirs = set(torch.distributed.get_process_group_ranks(module.process_group))
        if among is None or len(theirs & among) > 1:
            raise UnsupportedError(IN_DDP.format(wrapper))


def check_not_private(name: str, parameter: torch.Tensor) -> None:
    """Raises UnsupportedError if per-example gradients were made for this parameter, as Opacus does."""
    if getattr(parameter, "grad_sample", None) is not None:
        raise UnsupportedError(PRIVATE.format(f"parameter {name!r} has per-example gradients (grad_sample)"))


def check_alone(engine: str) -> None:
    """Checks that no launcher started several ranks, where this process is the only rank of the job. engine: 'horovod' or 'torch'."""
    launchers.check_alone(
        {"horovod": "Horovod", "torch": "torch.distributed"}[engine],
        "Start with torchrun or horovodrun, and call hvd.init() first",
    )
