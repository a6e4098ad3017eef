"""Broadcasts of parameters, optimizer states and Python objects, and batch normalization across ranks."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .handles import Sum, start_broadcast, together
from .reduce import allreduce
from .world import ProcessSet, global_process_set, group_of, rank, size

try:  # Horovod pickles with cloudpickle, so that lambdas can travel; grace_ext does not depend on it
    from cloudpickle import dumps
except ImportError:
    from pickle import dumps


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    """Returns root_rank's object, on every rank of the set."""
    group = group_of(process_set)
    if root_rank not in process_set.ranks:
        raise ValueError(f"root_rank {root_rank} is not one of the ranks {process_set.ranks}")
    if group is None:
        return obj
    packed: list[Any] = [dumps(obj) if rank() == root_rank else None]
    dist.broadcast_object_list(packed, root_rank, group)
    return obj if rank() == root_rank else pickle.loads(packed[0])


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """Returns the objects of all ranks, in rank order."""
    packed: list[Any] = [dumps(obj)] * size()
    group = group_of(global_process_set)
    if group:
        dist.all_gather_object(packed, packed[0], group)
    return [pickle.loads(data) for data in packed]


def broadcast_parameters(params: dict[str, Tensor] | list, root_rank: int) -> None:
    """Overwrites the parameters with those of root_rank. params: a state_dict, or a list of tensors or of (name, tensor)."""
    if isinstance(params, dict):
        tensors = [tensor for _, tensor in sorted(params.items())]
    elif isinstance(params, list):
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    else:
        raise ValueError(f"params must be a dict or a list, not {type(params).__name__}; use list(model.named_parameters())")
    together([start_broadcast(tensor, root_rank, global_process_set, True) for tensor in tensors]).result()


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: nn.Module | None = None) -> None:
    """Gives every rank's optimizer the state and the hyperparameters of root_rank's, whether or not it has any state yet.

    Only `state` and `param_groups` travel; other entries of the state_dict belong to their rank and stay. `model` is ignored.
    """
    local = optimizer.state_dict()
    shared = {key: _on_cpu(local[key]) for key in ("state", "param_groups")} if rank() == root_rank else None
    shared = broadcast_object(shared, root_rank)
    if rank() != root_rank:
        optimizer.load_state_dict({**local, **shared})


def _on_cpu(value: Any) -> Any:
    """Moves tensors to the CPU: pickled on their device, they would arrive on root_rank's device number on every rank."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
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
