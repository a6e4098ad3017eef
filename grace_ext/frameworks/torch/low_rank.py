"""`fsdp_hook(..., share_low_rank=True)`: the matrices that the shards of a replica exchange as one, sharing PowerSGD's Q."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.tensor import Shard

from ...composition.grace import Grace
from ...composition.sharing import OUT, check_sharing, shares_rows
from ...compressors.forms.rows import OF_WHOLE
from ...driver.choices import Choices
from ...errors import GraceError, UnsupportedError
from ...parts.tensor import Rows, TensorSpec
from .guards import local_of
from .ops import describe
from .resharding import rows_of


def shared_rows(g: Grace, parameters: Mapping[str, Any]) -> dict[str, Rows]:
    """Returns, by name, which rows of each matrix that is exchanged as a whole this rank has. Raises ParameterError or
    UnsupportedError, the same on all ranks, if what is compressed by low rank cannot be exchanged so."""
    check_sharing(g)
    found: dict[str, Rows] = {}
    for name, parameter in parameters.items():
        shape, mesh = tuple(parameter.shape), parameter.device_mesh
        whole = TensorSpec(name, shape, describe(local_of(parameter))[1], Rows(shape[:1], 0))
        if len(shape) < 2 or not shares_rows(g, whole):
            continue
        if mesh.ndim > 1 or tuple(parameter.placements) != (Shard(0),):
            raise UnsupportedError(
                f"parameter {name!r} is placed as {parameter.placements} over a mesh of shape {tuple(mesh.shape)}, and shards share Q of "
                "matrices only that fully_shard alone cuts, along dimension 0: use no shard_placement_fn for it and no tensor parallelism, "
                f"{OUT}"
            )
        ends = [rows_of(shard, mesh.size(), shape[0]) for shard in range(mesh.size())]
        found[name] = Rows(tuple(end - first for first, end in ends), mesh.get_local_rank())
    meshes = {tuple(parameters[name].device_mesh.mesh.tolist()) for name in found}
    if len(meshes) > 1:
        raise UnsupportedError(f"matrices are sharded over ranks {' and '.join(map(str, sorted(meshes)))}: shard all over one mesh, {OUT}")
    return found


def check_same_sharing(g: Grace, saved: Mapping[str, Any], rows: Mapping[str, Rows]) -> None:
    """Raises GraceError if Q in a state is of whole matrices and this exchange has one for each shard, or the other way round."""
    learnt = Choices(g).shared()
    for path in saved["state"]:
        key, name = path.split("/", 1)
        whole = key.endswith(OF_WHOLE)
        if whole and name not in rows or not whole and name in rows and key + OF_WHOLE in learnt:
            raise GraceError(
                f"this state was saved {'with' if whole else 'without'} share_low_rank=True, so Q of {name!r} is that of "
                f"{'the whole matrix' if whole else 'one shard'}: call fsdp_hook in the same way. To change it, load a checkpoint of "
                "torch.distributed.checkpoint by hvd.DistributedState(state, shards=...): it keeps what was not sent, and starts Q anew"
            )
