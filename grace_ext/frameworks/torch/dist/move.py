"""allgather, broadcast, alltoall and barrier of horovod.torch, over torch.distributed.

The blocking functions are differentiable; their gradients have the same factors as Horovod's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .channel import Collective
from .handles import differentiable, hand_out, start
from .pieces import Average, allgather_piece, allreduce_piece, alltoall_piece, broadcast_piece, check_root, reduction
from .world import ProcessSet, channel_of, global_process_set, rank


def _start_allgather(kind: str, name: str | None, tensors: Sequence[Tensor], process_set: ProcessSet) -> Collective:
    return start(kind, name, process_set, (allgather_piece(tensor) for tensor in tensors))


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Starts a concatenation of the ranks' tensors along the first dimension, which may differ; returns the handle."""
    return hand_out(_start_allgather("allgather", name, [tensor], process_set))


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Returns the ranks' tensors concatenated along the first dimension, which may differ."""
    return _allgathered("allgather", name, [tensor], process_set)[0]


def grouped_allgather_async(tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Like allgather_async for several tensors under one handle, whose result is a tuple."""
    return hand_out(_start_allgather("grouped_allgather", name, tensors, process_set), grouped=True)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> tuple[Tensor, ...]:
    """Like allgather for several tensors."""
    return _allgathered("grouped_allgather", name, tensors, process_set)


def _allgathered(kind: str, name: str | None, tensors: Sequence[Tensor], process_set: ProcessSet) -> tuple[Tensor, ...]:
    def gathered(tensors: Sequence[Tensor], name: str | None = None) -> Sequence[Tensor]:
        return _start_allgather(kind, name, tensors, process_set).result()

    def own_gradients(grads: Sequence[Tensor]) -> list[Tensor]:
        means = _averaged(grads, process_set)
        lengths = gathered([torch.tensor([tensor.shape[0]]).to(tensor.device) for tensor in tensors])
        firsts = [int(rows[: process_set.rank()].sum()) for rows in lengths]
        return [mean.narrow(0, first, len(own)) for mean, first, own in zip(means, firsts, tensors, strict=True)]

    return differentiable(lambda tensors: gathered(tensors, name), own_gradients, tensors)


def _averaged(tensors: Sequence[Tensor], process_set: ProcessSet) -> Sequence[Tensor]:
    def means(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        pieces = (allreduce_piece(tensor, Average, 1.0, 1.0, process_set) for tensor in tensors)
        return start("grouped_allreduce", None, process_set, pieces, **reduction(Average, 1.0, 1.0)).result()

    return differentiable(means, lambda grads: _averaged(grads, process_set), tensors)


def _start_broadcast(tensor: Tensor, root_rank: int, name: str | None, process_set: ProcessSet, in_place: bool = False) -> Collective:
    check_root(root_rank, process_set)
    return start("broadcast", name, process_set, [broadcast_piece(tensor, root_rank, in_place)], root_rank=root_rank)


def broadcast_async(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Starts to send root_rank's tensor to all; returns the handle. On the other ranks `tensor` gives its shape and dtype."""
    return hand_out(_start_broadcast(tensor, root_rank, name, process_set))


def broadcast_async_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Like broadcast_async, but the result replaces `tensor` (once synchronized)."""
    return hand_out(_start_broadcast(tensor, root_rank, name, process_set, True))


def broadcast_(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Overwrites `tensor` with root_rank's tensor and returns it."""
    return _start_broadcast(tensor, root_rank, name, process_set, True).result()[0]


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Returns root_rank's tensor. Its gradient goes to root_rank; the inputs of the other ranks get zeros."""

    def sent(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return _start_broadcast(tensors[0], root_rank, name, process_set).result()

    def gradient_to_root(grads: Sequence[Tensor]) -> list[Tensor]:
        # A product instead of zeros_like: for second derivatives, every rank's graph must lead to the same collectives.
        return [mean * (rank() == root_rank) for mean in _averaged(grads, process_set)]

    return differentiable(sent, gradient_to_root, [tensor])[0]


def _start_alltoall(tensor: Tensor, splits: Tensor | Sequence[int] | None, name: str | None, process_set: ProcessSet) -> Collective:
    return start("alltoall", name, process_set, (alltoall_piece(t, splits, process_set) for t in [tensor]))


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts to send `splits[i]` rows to rank i; returns the handle, whose result is (rows received, number of rows per sender)."""
    return hand_out(_start_alltoall(tensor, splits, name, process_set))


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
        ((output, received),) = _start_alltoall(tensors[0], splits, name, process_set).result()
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
    channel_of(process_set).barrier()
