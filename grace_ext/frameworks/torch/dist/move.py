"""allgather, broadcast, alltoall and barrier of horovod.torch, over torch.distributed.

`name` is accepted and ignored. The blocking functions are differentiable; their gradients have the same factors as Horovod's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .handles import Average, differentiable, hand_out, start_allgather, start_allreduce, start_alltoall, start_broadcast, start_each
from .world import ProcessSet, global_process_set, group_of, rank


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Starts a concatenation of the ranks' tensors along the first dimension, which may differ; returns the handle."""
    return hand_out(start_allgather(tensor, process_set))


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Returns the ranks' tensors concatenated along the first dimension, which may differ."""
    return grouped_allgather([tensor], name, process_set)[0]


def grouped_allgather_async(tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Like allgather_async for several tensors under one handle, whose result is a tuple."""
    return hand_out(start_each(start_allgather, tensors, process_set))


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> tuple[Tensor, ...]:
    """Like allgather for several tensors."""

    def gathered(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return start_each(start_allgather, tensors, process_set).result()

    def own_gradients(grads: Sequence[Tensor]) -> list[Tensor]:
        means = _averaged(grads, process_set)
        lengths = gathered([torch.tensor([tensor.shape[0]]).to(tensor.device) for tensor in tensors])
        firsts = [int(rows[: process_set.rank()].sum()) for rows in lengths]
        return [mean.narrow(0, first, len(own)) for mean, first, own in zip(means, firsts, tensors, strict=True)]

    return differentiable(gathered, own_gradients, tensors)


def _averaged(tensors: Sequence[Tensor], process_set: ProcessSet) -> Sequence[Tensor]:
    def means(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return start_each(start_allreduce, tensors, Average, 1.0, 1.0, process_set).result()

    return differentiable(means, lambda grads: _averaged(grads, process_set), tensors)


def broadcast_async(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Starts to send root_rank's tensor to all; returns the handle. On the other ranks `tensor` gives its shape and dtype."""
    return hand_out(start_broadcast(tensor, root_rank, process_set))


def broadcast_async_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Like broadcast_async, but the result replaces `tensor` (once synchronized)."""
    return hand_out(start_broadcast(tensor, root_rank, process_set, True))


def broadcast_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Overwrites `tensor` with root_rank's tensor and returns it."""
    return start_broadcast(tensor, root_rank, process_set, True).result()


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Returns root_rank's tensor. Its gradient goes to root_rank; the inputs of the other ranks get zeros."""

    def sent(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return start_each(start_broadcast, tensors, root_rank, process_set).result()

    def gradient_to_root(grads: Sequence[Tensor]) -> list[Tensor]:
        # A product instead of zeros_like: for second derivatives, every rank's graph must lead to the same collectives.
        return [mean * (rank() == root_rank) for mean in _averaged(grads, process_set)]

    return differentiable(sent, gradient_to_root, [tensor])[0]


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts to send `splits[i]` rows to rank i; returns the handle, whose result is (rows received, number of rows per sender)."""
    return hand_out(start_alltoall(tensor, splits, process_set))


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sends `splits[i]` rows to rank i (without splits: equal shares). Returns the rows received, in rank order; with splits, also how
    many came from each rank."""
    counts: list[Tensor] = []

    def exchanged(tensors: Sequence[Tensor]) -> list[Tensor]:
        output, received = start_alltoall(tensors[0], splits, process_set).result()
        counts.append(received)
        return [output]

    def returned_gradient(grads: Sequence[Tensor]) -> list[Tensor]:
        sent_back, _ = alltoall(grads[0], counts[0], process_set=process_set)
        unsent = sent_back.new_zeros((len(tensor) - len(sent_back), *tensor.shape[1:]))
        return [torch.cat([sent_back, unsent])]

    (output,) = differentiable(exchanged, returned_gradient, [tensor])
    return output if splits is None else (output, counts[0])


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Waits until all ranks of the set have called it."""
    group = group_of(process_set)
    if group:
        dist.barrier(group)
