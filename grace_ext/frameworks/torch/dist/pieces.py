"""Describes one tensor's part of each collective: what the ranks compare of it, and how it is launched (see channel.py).

Data that is only moved travels as bytes, so every dtype works. In a job of one process nothing is launched, and the same code returns
copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....errors import UnsupportedError
from ..ops import as_bytes
from .channel import Piece
from .groups import Groups
from .signature import TensorSignature
from .world import ProcessSet, channel_of

Average, Sum, Adasum, Min, Max, Product = range(6)

_REDUCTIONS = {
    Average: ("Average", dist.ReduceOp.SUM),
    Sum: ("Sum", dist.ReduceOp.SUM),
    Min: ("Min", dist.ReduceOp.MIN),
    Max: ("Max", dist.ReduceOp.MAX),
    Product: ("Product", dist.ReduceOp.PRODUCT),
}
# 16-bit floats would be rounded at every addition, and the sum that an average needs may overflow a short integer.
_REDUCED_AS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.bool: torch.int32,
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
}


def not_dense(value: Any) -> str:
    """Returns what this value is, if a collective cannot take it as a tensor; else ''."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    if nn.parameter.is_lazy(value):
        return "a lazy parameter, without data before the first forward pass"
    if value.layout != torch.strided:
        return f"a tensor with layout {str(value.layout).removeprefix('torch.')}"
    if value.is_quantized:
        return "a quantized tensor"
    if value.is_meta:
        return "a meta tensor, without data"
    if hasattr(value, "device_mesh"):
        return "a DTensor, of which every rank has another part"
    return ""


def _checked(tensor: Tensor, by_rows: str = "") -> Tensor:
    """Returns the tensor, detached. Raises ValueError if it is not dense or, for the collective `by_rows`, has no first dimension."""
    if not_dense(tensor):
        raise ValueError(f"a collective takes dense tensors, and this one is {not_dense(tensor)}")
    if by_rows and tensor.dim() == 0:
        raise ValueError(f"{by_rows} works along the first dimension, and a scalar tensor has none; use tensor.unsqueeze(0)")
    return tensor.detach().resolve_conj().resolve_neg()


def _buffer(source: Tensor, tensor: Tensor, in_place: bool, dtype: torch.dtype) -> Tensor:
    """Returns contiguous memory for a result of this dtype, with the data of `source`: if possible, that of `tensor` itself."""
    if in_place and dtype == tensor.dtype and source.is_contiguous() and source.data_ptr() == tensor.data_ptr():
        return source
    return source.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _delivered(result: Tensor, tensor: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return result
    target = tensor.detach()
    for dim in _expanded(tensor):  # along which all ranks' tensors have one element, and so has the result
        target, result = target.narrow(dim, 0, 1), result.narrow(dim, 0, 1)
    target.copy_(result)  # no copy if result is the tensor's own memory
    return tensor


def _expanded(tensor: Tensor) -> list[int]:
    """Returns the dimensions along which one element stands for all, as Tensor.expand makes them."""
    return [dim for dim, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[dim] > 1]


def _piece(
    tensor: Tensor, launch: Callable[[Groups, Sequence[int]], Any], value: int | None = None, by_rows: bool = False,
    in_place: bool = False, name: str = "",
) -> Piece:  # fmt: skip
    shape = ("*", *tensor.shape[1:]) if by_rows else tuple(tensor.shape)
    expanded = _expanded(tensor) if in_place else []
    note = f"expanded along dimension {expanded}" if expanded else ""
    signature = TensorSignature(tensor.dtype, shape, tensor.device.type, note, name)
    return Piece(signature, launch, value, torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None)


def _typed(data: Tensor, like: Tensor, rows: int) -> Tensor:
    """Returns the bytes as a tensor of `rows` rows, each of the dtype and shape of a row of `like`."""
    return data.view(like.dtype).reshape(rows, *like.shape[1:])


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _scale_(tensor: Tensor, factor: float, divisor: int = 1) -> Tensor:
    """Scales in place; integers are scaled as float64 and cut toward zero."""
    if factor == 1 and divisor == 1:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.mul_(factor).div_(divisor) if factor != 1 else tensor.div_(divisor)
    return tensor.copy_(tensor.double().mul_(factor).div_(divisor))


def reduction(op: int, prescale: float, postscale: float) -> dict[str, Any]:
    """Returns what the ranks compare of the options of a reduction. Raises an error if there is no such op."""
    if op == Adasum:
        raise UnsupportedError(
            "op=hvd.Adasum is not available over torch.distributed, which only has elementwise reductions; "
            "use Average or Sum, or launch with horovodrun"
        )
    if op not in _REDUCTIONS:
        raise ValueError(f"op is {op!r}; it must be one of hvd.Average, Sum, Min, Max, Product")
    factors = {} if prescale == postscale == 1 else {"prescale_factor": float(prescale), "postscale_factor": float(postscale)}
    return {"op": _REDUCTIONS[op][0], **factors}


def allreduce_piece(tensor: Tensor, op: int, prescale: float, postscale: float, process_set: ProcessSet, in_place: bool = False) -> Piece:
    """Describes a reduction over the ranks of the set. in_place: the result is `tensor` itself."""
    buffer = _buffer(_checked(tensor), tensor, in_place, _REDUCED_AS.get(tensor.dtype, tensor.dtype))
    ranks = len(process_set.ranks) if op == Average else 1

    def launch(groups: Groups, _: Any) -> Any:
        _scale_(buffer, prescale)
        works = [dist.all_reduce(buffer, _REDUCTIONS[op][1], groups.data, async_op=True)] if groups.data else []
        return works, lambda: _delivered(_scale_(buffer, postscale, ranks).to(tensor.dtype), tensor, in_place)

    return _piece(tensor, launch, in_place=in_place)


def reducescatter_piece(tensor: Tensor, op: int, prescale: float, postscale: float, process_set: ProcessSet) -> Piece:
    """Describes a reduction whose result is this rank's share of the rows; the first ranks get one more if they do not divide evenly."""
    rows = len(_checked(tensor, "reducescatter"))
    # torch.distributed scatters only equal shares, and padding would cut at other rows than Horovod does.
    whole = allreduce_piece(tensor, op, prescale, postscale, process_set)
    me, (share, extra) = process_set.rank(), divmod(rows, len(process_set.ranks))
    assert me is not None  # the callers raise if the set is not registered
    first, mine = me * share + min(me, extra), share + (me < extra)

    def launch(groups: Groups, _: Any) -> Any:
        works, finish = whole.launch(groups, ())
        return works, lambda: finish().narrow(0, first, mine).clone()

    return _piece(tensor, launch)


def allgather_piece(tensor: Tensor, on_host: bool = False) -> Piece:
    """Describes a concatenation of the ranks' tensors along the first dimension, which may differ between ranks. on_host: the tensor is in
    host memory, whatever backend the set has for data."""
    source = _checked(tensor, "allgather")

    def launch(groups: Groups, lengths: Sequence[int]) -> Any:
        group = groups.control if on_host else groups.data
        if group is None:
            return [], source.clone
        # Gloo and NCCL gather only equal sizes: all send as much as the longest has, and cut what has arrived.
        own, longest = as_bytes(source), max(lengths) * _row_bytes(source)
        if own.numel() < longest:
            own = torch.cat([own, own.new_zeros(longest - own.numel())])
        received = [torch.empty_like(own) for _ in lengths]

        def finish() -> Tensor:
            parts = [part[: rows * _row_bytes(source)] for part, rows in zip(received, lengths, strict=True)]
            return _typed(torch.cat(parts), source, sum(lengths))

        return [dist.all_gather(received, own, group, async_op=True)] if longest else [], finish

    return _piece(tensor, launch, len(source), by_rows=True)


def broadcast_piece(tensor: Tensor, root_rank: int, in_place: bool = False, name: str = "") -> Piece:
    """Describes sending the tensor of `root_rank` (a rank of the job, not of the set) to all. in_place: the result is `tensor` itself."""
    buffer = _buffer(_checked(tensor), tensor, in_place, tensor.dtype)

    def launch(groups: Groups, _: Any) -> Any:
        works = [dist.broadcast(as_bytes(buffer), root_rank, groups.data, async_op=True)] if groups.data and buffer.numel() else []
        return works, lambda: _delivered(buffer, tensor, in_place)

    return _piece(tensor, launch, in_place=in_place, name=name)


def check_root(root_rank: int, process_set: ProcessSet) -> None:
    """Raises ValueError if the set is not registered, or the root is not in it."""
    channel_of(process_set)
    if root_rank not in process_set.ranks:
        raise ValueError(f"root_rank {root_rank} is not one of the ranks {process_set.ranks}")


def alltoall_piece(tensor: Tensor, splits: Tensor | Sequence[int] | None, process_set: ProcessSet) -> Piece:
    """Describes sending `splits[i]` rows to rank i of the set. The result is (rows received, number of rows from each rank)."""
    source = _checked(tensor, "alltoall")
    sent = _rows_to_send(source, splits, len(process_set.ranks))
    like = splits if isinstance(splits, Tensor) else torch.empty(0, dtype=torch.int32)

    def launch(groups: Groups, _: Any) -> Any:
        data, received = as_bytes(source)[: sum(sent) * _row_bytes(source)], sent
        if groups.data:
            received = _rows_to_receive(sent, groups, source.device)
        output = data.new_empty(sum(received) * _row_bytes(source)) if groups.data else data.clone()
        sizes = [rows * _row_bytes(source) for rows in received], [rows * _row_bytes(source) for rows in sent]
        works = [dist.all_to_all_single(output, data, *sizes, group=groups.data, async_op=True)] if groups.data else []
        return works, lambda: (_typed(output, source, sum(received)), like.new_tensor(received))

    return _piece(tensor, launch, by_rows=True)


def _rows_to_send(tensor: Tensor, splits: Tensor | Sequence[int] | None, ranks: int) -> list[int]:
    rows = len(tensor)
    if splits is None:
        if rows % ranks:
            raise ValueError(f"alltoall without splits needs a first dimension divisible by the {ranks} ranks, not {rows}")
        return [rows // ranks] * ranks
    counts = torch.as_tensor(splits)
    sent = counts.tolist()
    if counts.dtype.is_floating_point or counts.shape != (ranks,) or min(sent) < 0 or sum(sent) > rows:
        raise ValueError(f"splits {sent} must be {ranks} counts, one per rank, that add up to at most the {rows} rows")
    return sent


def _rows_to_receive(sent: Sequence[int], groups: Groups, device: torch.device) -> list[int]:
    """Tells the others how many rows each of them gets. As every rank hears from every other, it also compares what they have started."""
    offer = torch.tensor([[rows, groups.token()] for rows in sent], device=device)
    answer = torch.empty_like(offer)
    groups.wait([dist.all_to_all_single(answer, offer, group=groups.data, async_op=True)], "the exchange of alltoall's sizes", device.type)
    received, tokens = zip(*answer.tolist(), strict=True)
    groups.check_alike(tokens)
    return list(received)
