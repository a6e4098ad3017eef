"""The shards of a model that `fully_shard` (FSDP2) has sharded: which parameters it has, on which ranks the shards of a replica are, and
what these ranks tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...errors import GraceError, ParameterError, UnsupportedError, shown
from .guards import FSDP, TENSOR_PARALLEL, is_dtensor, name_of

TWO_DIMENSIONS = (
    "parameter {!r} is placed as {} over a mesh that holds the ranks {} of the replicate mesh, too, so fully_shard exchanges gradients "
    "between replicas itself, uncompressed. Give it the shard mesh alone: fully_shard(model, mesh=mesh['shard']), and "
    "hvd.fsdp_hook(g, model, mesh['replicate'])"
)
NOT_SHARDED = (
    "parameter {!r} is whole, as fully_shard has not sharded it. Call fully_shard(model, mesh=mesh['shard']) first, on the whole model and "
    "without ignored_params; or, if it shall not train, requires_grad_(False). For a model that is whole on every rank use "
    "DistributedDataParallel and hvd.ddp_comm_hook"
)
ON_META = "parameter {!r} has no memory yet (device meta): call hvd.fsdp_hook after model.to_empty(device=...) and its initialization"
SHARDS_DIFFER = (
    "the shards of this replica would not exchange the same matrices together: shard {} has {}, and this rank {}. Let every rank call "
    "fsdp_hook with the same model, spec and share_low_rank"
)
ELSEWHERE = "The replicas of another shard of this model cannot exchange their gradients, so no rank does. {}"


def sharded_parameters(model: torch.nn.Module, replicas: Sequence[int]) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that train, by name. Raises UnsupportedError unless fully_shard has sharded all of them, inside replicas.

    replicas: the ranks that hold the same shards of the replicas, among them this one."""
    try:
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    except ImportError as error:
        raise UnsupportedError(f"hvd.fsdp_hook needs torch 2.6 or later, and this is {torch.__version__}") from error
    modules = list(model.modules())
    named = [(name_of(name), parameter) for name, parameter in model.named_parameters()]
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise UnsupportedError(FSDP.format(named[0][0] if named else ""))
    inside = {id(p) for module in modules if isinstance(module, FSDPModule) for p in module.parameters()}
    found = {name: parameter for name, parameter in named if parameter.requires_grad}
    for name, parameter in found.items():
        if is_dtensor(parameter) and id(parameter) not in inside:
            sharded: Any = parameter
            raise UnsupportedError(TENSOR_PARALLEL.format(name, sharded.placements, tuple(sharded.device_mesh.shape)))
        check_sharded(name, parameter, replicas)
    if not found:
        raise ParameterError("none of the model's parameters requires a gradient")
    return found


def check_sharded(name: str, parameter: Any, replicas: Sequence[int]) -> None:
    """Raises UnsupportedError unless this parameter is sharded inside a replica."""
    if not is_dtensor(parameter):
        raise UnsupportedError(NOT_SHARDED.format(name))
    common = sorted(set(parameter.device_mesh.mesh.flatten().tolist()) & set(replicas))
    if len(common) > 1:
        raise UnsupportedError(TWO_DIMENSIONS.format(name, parameter.placements, common))
    if parameter.is_meta:
        raise UnsupportedError(ON_META.format(name))


def place_of(coordinate: Sequence[int], shape: Sequence[int]) -> str:
    """Names a place in a mesh of shards; empty if there is only one."""
    return f"{tuple(coordinate)} of mesh {tuple(shape)}" if max(shape) > 1 else ""


class ShardRanks:
    """The ranks that hold the shards of one replica, this one among them. Every method is a collective of all of them."""

    def __init__(self, parameters: Iterable[Any]):
        meshes: dict[str, DeviceMesh] = {}
        for parameter in parameters:
            mesh = parameter.device_mesh
            meshes.setdefault(place_of(mesh.get_coordinate(), mesh.shape), mesh)
        self._device = next(iter(meshes.values())).device_type
        #: All of them, if they make one mesh.
        self.ranks: list[int] = next(iter(meshes.values())).mesh.flatten().tolist()
        # What every rank passes on along one dimension after the other has reached all ranks of the mesh.
        self._groups = [mesh.get_group(i) for mesh in meshes.values() for i in range(mesh.ndim) if mesh.size(i) > 1]
        self.alone = not self._groups
        #: This rank's place among them, in words; empty if it is the only one.
        self.place = ", ".join(filter(None, meshes))

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on all of these ranks."""
        if self.alone:
            return flag
        common = torch.tensor([int(flag)], dtype=torch.int32, device=self._device)
        for group in self._groups:
            dist.all_reduce(common, op=dist.ReduceOp.MIN, group=group)
        return bool(common.item())

    def together(self, call: Callable[[], Any], describe: Callable[[], Any] = lambda: None) -> None:
        """Makes a call that may fail on some of these ranks. If it does, it raises a GraceError on all; and also if they then describe
        themselves differently."""
        failure: GraceError | None = None
        try:
            call()
        except GraceError as error:
            failure = error
        said = [] if failure is None else [f"Shard {self.place}: {failure}"]
        own = None if failure else describe()
        others = [(self.place, own)]
        for group in self._groups:
            heard: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(heard, (said, others), group=group)
            said, others = ([one for every in heard for one in every[i]] for i in (0, 1))
        if failure is not None:
            raise failure
        if said:
            raise GraceError(ELSEWHERE.format(said[0]))
        for place, other in others:
            if other != own:
                raise GraceError(SHARDS_DIFFER.format(place, shown(other, 200), shown(own, 200)))
