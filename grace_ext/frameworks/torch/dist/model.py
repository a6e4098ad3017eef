"""Broadcasts of parameters, optimizer states and Python objects, and batch normalization across ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..in_front import keeps_containers
from ..ops import as_bytes
from .channel import Piece
from .groups import Groups, HorovodInternalError
from .handles import start
from .pieces import Sum, allgather_piece, broadcast_piece, check_root, not_dense
from .reduce import allreduce
from .signature import TensorSignature, digest
from .world import ProcessSet, global_process_set, rank, size

try:  # Horovod pickles with cloudpickle, so that lambdas can travel; grace_ext does not depend on it
    from cloudpickle import dumps
except ImportError:
    from pickle import dumps

#: The end of the names under which a state_dict has what `get_extra_state` returned.
_EXTRA_STATE = "_extra_state"


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    """Returns root_rank's object, on every rank of the set."""
    return _from_root("broadcast_object", lambda: obj, root_rank, name, process_set)


def _from_root(
    kind: str,
    make: Callable[[], Any],
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    **options: Any,
) -> Any:
    """Returns what `make` returns on root_rank, on every rank of the set. If it cannot be made or pickled, all ranks raise an error."""
    check_root(root_rank, process_set)
    is_root = rank() == root_rank
    if len(process_set.ranks) == 1:
        return make()
    packed = _Packed(make) if is_root else None

    def launch(groups: Groups, lengths: Sequence[int]) -> Any:
        _check_packed(kind, packed, lengths, process_set)
        data = torch.empty(max(lengths), dtype=torch.uint8) if packed is None else packed.data
        works = [dist.broadcast(data, root_rank, groups.control, async_op=True)]
        return works, lambda: _unpacked(data) if packed is None else packed.value

    return start(kind, name, process_set, [Piece(None, launch, packed.length if packed else 0)], root_rank=root_rank, **options).result()[0]


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Returns the objects of all ranks, in rank order."""
    packed = _Packed(lambda: obj)
    bytes_of_all = allgather_piece(packed.data, on_host=True)

    def launch(groups: Groups, lengths: Sequence[int]) -> Any:
        _check_packed("allgather_object", packed, lengths, global_process_set)
        works, finish = bytes_of_all.launch(groups, lengths)
        return works, lambda: [_unpacked(data) for data in finish().split(list(lengths))]

    return start("allgather_object", name, global_process_set, [Piece(None, launch, packed.length)]).result()[0]


class _Packed:
    """An object as pickled bytes. If it cannot be pickled, `length` is -1 and `problem` is the error."""

    def __init__(self, make: Callable[[], Any]):
        self.problem: Exception | None = None
        self.data = torch.empty(0, dtype=torch.uint8)
        try:
            self.value = make()
            self.data = torch.frombuffer(bytearray(dumps(self.value)), dtype=torch.uint8)
        except Exception as error:
            self.problem = error
        self.length = -1 if self.problem else len(self.data)


def _check_packed(kind: str, packed: _Packed | None, lengths: Sequence[int], process_set: ProcessSet) -> None:
    """Raises an error if a rank could not pickle its object: its own error there, HorovodInternalError on the other ranks."""
    if packed is not None and packed.problem is not None:
        raise packed.problem
    failed = [rank for rank, length in zip(process_set.ranks, lengths, strict=True) if length < 0]
    if failed:
        raise HorovodInternalError(f"{kind}: rank {failed[0]} could not pickle its object; the error there says why")


def _unpacked(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())


def broadcast_parameters(params: dict[str, Tensor] | list, root_rank: int) -> None:
    """Overwrites the parameters with those of root_rank. params: a state_dict, or a list of tensors or of (name, tensor).

    What `get_extra_state` gave to a state_dict cannot be overwritten in place: ValueError, on all ranks, if it is not equal on all ranks.
    The same for other objects. Tensors without dense data (meta, lazy, quantized, DTensor) raise ValueError, too, but sparse COO tensors
    are overwritten, if the ranks' have equally many elements."""
    if isinstance(params, dict):
        named = sorted(params.items())
    elif isinstance(params, list):
        named = [p if isinstance(p, tuple) else (f"{i}", p) for i, p in enumerate(params)]
    else:
        raise ValueError(f"params must be a dict or a list, not {type(params).__name__}; use list(model.named_parameters())")
    check_root(root_rank, global_process_set)
    checks, moves = [], []
    for name, value in named:
        if not isinstance(value, Tensor) or str(name).endswith(_EXTRA_STATE):
            checks.append(_equal_piece(str(name), value))
        elif value.layout == torch.sparse_coo:
            moves += _sparse_pieces(str(name), value, root_rank)
        elif not_dense(value):
            checks.append(_refused_piece(str(name), not_dense(value)))
        else:
            moves.append(broadcast_piece(value, root_rank, in_place=True, name=str(name)))
    # The checks come first: if one of them fails, no rank has launched any data.
    start("broadcast_parameters", None, global_process_set, checks + moves, root_rank=root_rank).result()


def _equal_piece(name: str, value: Any) -> Piece:
    """Checks that an object is equal on all ranks, by a digest of its pickled form."""
    packed = _Packed(lambda: _with_tensors(_plain, value))
    own = -1 if packed.problem else int.from_bytes(digest(packed.data.numpy().tobytes())[:7], "little")

    def launch(groups: Groups, of_all: Sequence[int]) -> Any:
        if packed.problem is not None:
            raise packed.problem
        if len(set(of_all)) > 1:
            raise ValueError(
                f"broadcast_parameters overwrites tensors in place, but {name!r} is an object (as get_extra_state returns it) and not "
                "equal on all ranks. Leave it out, send it by hvd.broadcast_object, and pass it to load_state_dict"
            )
        return [], lambda: value

    return Piece(TensorSignature(f"an object of type {type(value).__name__}", (), "", name=name), launch, own)


def _sparse_pieces(name: str, value: Tensor, root_rank: int) -> list[Piece]:
    """Overwrites indices and values: a tensor of a state_dict shares no more with the module's. So their numbers must be equal."""
    order = "coalesced" if value.is_coalesced() else "not coalesced"
    parts = {f"indices, {order}, for {list(value.shape)}": value._indices(), "values": value._values()}
    return [broadcast_piece(part, root_rank, in_place=True, name=f"{name} ({role})") for role, part in parts.items()]


def _refused_piece(name: str, reason: str) -> Piece:
    def launch(groups: Groups, _: Sequence[int]) -> Any:
        raise ValueError(f"broadcast_parameters overwrites tensors in place, but {name!r} is {reason}; leave it out")

    return Piece(TensorSignature(reason, (), "", name=name), launch)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: nn.Module | None = None) -> None:
    """Gives every rank's optimizer the state and the hyperparameters of root_rank's, whether or not it has any state yet.

    Only `state` and `param_groups` travel; other entries of the state_dict belong to their rank and stay. The optimizer keeps its
    dictionaries, in which the contents are replaced. `model` is ignored.
    """
    local = optimizer.state_dict()
    groups = tuple(len(group["params"]) for group in local["param_groups"])
    shared = _from_root(
        "broadcast_optimizer_state", lambda: {key: _on_cpu(local[key]) for key in ("state", "param_groups")}, root_rank,
        optimizer=type(optimizer).__name__, parameters_per_group=groups,
    )  # fmt: skip
    if rank() != root_rank:
        hook = optimizer.register_load_state_dict_post_hook(keeps_containers(optimizer.param_groups, optimizer.state))
        try:
            optimizer.load_state_dict({**local, **shared})
        finally:
            hook.remove()


def _on_cpu(value: Any) -> Any:
    """Moves tensors to the CPU: pickled on their device, they would arrive on root_rank's device number on every rank."""
    return _with_tensors(Tensor.cpu, value)


def _plain(tensor: Tensor) -> Any:
    """Returns dtype, shape and bytes of a tensor: its pickled form differs between processes."""
    return tensor if not_dense(tensor) else (str(tensor.dtype), tuple(tensor.shape), as_bytes(tensor.detach().cpu()).numpy().tobytes())


def _with_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Returns the value with `change` of every tensor in it, also in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_tensors(change, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_tensors(change, item) for item in value)
    return value


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over the batch of all ranks together. It works on any device, unlike torch.nn.SyncBatchNorm."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm needs (batch, channels, ...), not a {input.dim()}-dimensional tensor")

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes by the statistics of all ranks' batch; in eval mode, by the running statistics if there are any."""
        self._check_input_dim(input)
        if size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        mean, variance, count = self._statistics(input)
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), variance.detach() * (count / (count - 1).clamp(min=1)))
        shape = [1, -1] + [1] * (input.dim() - 2)
        normalized = (input - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(input.dtype)

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean and variance per channel over all ranks, and the number of values; gradients flow to every rank's input."""
        exact = input.to(torch.promote_types(input.dtype, torch.float32)).transpose(0, 1).flatten(1)
        count = exact.new_tensor([exact.shape[1]])
        sums = allreduce(torch.cat([exact.sum(1), count]), op=Sum)
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        # The variance takes a second round, because the mean of squares minus the squared mean cancels if the mean is large.
        variance = allreduce((exact - mean[:, None]).square().sum(1), op=Sum) / count
        return mean, variance, count

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)
