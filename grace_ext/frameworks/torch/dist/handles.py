"""Starts collectives and keeps them until they are synchronized.

Each `start_*` launches one collective and returns a Pending; its result exists once the work is done and `finish` has run. Data that is
only moved travels as bytes, so every dtype works. In a job of one process without a group nothing is launched, and the same code returns
copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ....errors import UnsupportedError
from .world import HorovodInternalError, ProcessSet, group_of

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

Average, Sum, Adasum, Min, Max, Product = range(6)

_REDUCTIONS = {
    Average: dist.ReduceOp.SUM,
    Sum: dist.ReduceOp.SUM,
    Min: dist.ReduceOp.MIN,
    Max: dist.ReduceOp.MAX,
    Product: dist.ReduceOp.PRODUCT,
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


@dataclass
class Pending:
    """A launched collective: `works` to wait for, and `finish`, which then returns its result."""

    works: list[dist.Work]
    finish: Callable[[], Any]

    def done(self) -> bool:
        """Whether result() would not block."""
        return all(work.is_completed() for work in self.works)

    def result(self) -> Any:
        """Waits, then returns the result. Raises HorovodInternalError if the collective failed."""
        with _failures():
            for work in self.works:
                work.wait()
        with torch.no_grad():
            return self.finish()


_pending: dict[int, Pending] = {}
_handles = itertools.count(1)


def hand_out(pending: Pending) -> int:
    """Keeps a pending collective; returns the handle for poll() and synchronize()."""
    handle = next(_handles)
    _pending[handle] = pending
    return handle


def together(pending: Sequence[Pending]) -> Pending:
    """Joins several pending collectives into one, whose result is the tuple of theirs."""
    return Pending([work for p in pending for work in p.works], lambda: tuple(p.finish() for p in pending))


def start_each(start: Callable[..., Pending], tensors: Sequence[Tensor], *how: Any) -> Pending:
    """Starts the same collective for several tensors, in their order; the result is a tuple."""
    return together([start(tensor, *how) for tensor in tensors])


def poll(handle: int) -> bool:
    """Whether the collective of this handle is done, so that synchronize() will not block."""
    if handle not in _pending:
        raise ValueError(f"handle {handle} was synchronized already, or never existed")
    return _pending[handle].done()


def synchronize(handle: int) -> Any:
    """Waits for the collective of this handle and returns its result; None if the handle was synchronized before."""
    pending = _pending.pop(handle, None)
    return None if pending is None else pending.result()


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise HorovodInternalError(str(error)) from error


def _bytes(tensor: Tensor) -> Tensor:
    """Returns the tensor's elements as flat bytes, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _typed(data: Tensor, like: Tensor, rows: int) -> Tensor:
    """Returns the bytes as a tensor of `rows` rows, each of the dtype and shape of a row of `like`."""
    return data.view(like.dtype).reshape(rows, *like.shape[1:])


def _row_bytes(tensor: Tensor, what: str) -> int:
    if tensor.dim() == 0:
        raise ValueError(f"{what} works along the first dimension, and a scalar tensor has none; use tensor.unsqueeze(0)")
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _same_rows(row_bytes: Sequence[int], what: str) -> None:
    if len(set(row_bytes)) > 1:
        raise HorovodInternalError(
            f"{what}: the ranks' tensors may differ in their first dimension only, "
            f"but one row of them takes {list(row_bytes)} bytes; are all ranks at the same collective?"
        )


def _scale_(tensor: Tensor, factor: float, divisor: int = 1) -> Tensor:
    """Scales in place; integers are scaled as float64 and cut toward zero."""
    if factor == 1 and divisor == 1:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.mul_(factor).div_(divisor) if factor != 1 else tensor.div_(divisor)
    return tensor.copy_(tensor.double().mul_(factor).div_(divisor))


def start_allreduce(tensor: Tensor, op: int, prescale: float, postscale: float, process_set: ProcessSet, in_place: bool = False) -> Pending:
    """Starts a reduction over the ranks of the set. in_place: the result is `tensor` itself."""
    if op == Adasum:
        raise UnsupportedError(
            "op=hvd.Adasum is not available over torch.distributed, which only has elementwise reductions; "
            "use Average or Sum, or launch with horovodrun"
        )
    if op not in _REDUCTIONS:
        raise ValueError(f"op is {op!r}; it must be one of hvd.Average, Sum, Min, Max, Product")
    group = group_of(process_set)
    source, dtype = tensor.detach(), _REDUCED_AS.get(tensor.dtype, tensor.dtype)
    if in_place and dtype == tensor.dtype and source.is_contiguous():
        buffer = source
    else:
        buffer = source.to(dtype, copy=True, memory_format=torch.contiguous_format)
    _scale_(buffer, prescale)
    with _failures():
        works = [dist.all_reduce(buffer, _REDUCTIONS[op], group, async_op=True)] if group else []
    ranks = len(process_set.ranks) if op == Average else 1

    def finish() -> Tensor:
        return _delivered(_scale_(buffer, postscale, ranks).to(tensor.dtype), tensor, in_place)

    return Pending(works, finish)


def start_allgather(tensor: Tensor, process_set: ProcessSet) -> Pending:
    """Starts a concatenation of the ranks' tensors along the first dimension, which may differ between ranks."""
    row_bytes, group = _row_bytes(tensor, "allgather"), group_of(process_set)
    if group is None:
        return Pending([], tensor.detach().clone)
    # Gloo and NCCL gather only equal sizes: the ranks agree on the largest, send that much, and cut what has arrived.
    lengths = _agree_on_rows(tensor, row_bytes, group, len(process_set.ranks))
    longest = max(lengths) * row_bytes
    own = _bytes(tensor)
    if own.numel() < longest:
        own = torch.cat([own, own.new_zeros(longest - own.numel())])
    received = [torch.empty_like(own) for _ in lengths]
    with _failures():
        works = [dist.all_gather(received, own, group, async_op=True)] if longest else []

    def finish() -> Tensor:
        parts = [part[: rows * row_bytes] for part, rows in zip(received, lengths, strict=True)]
        return _typed(torch.cat(parts), tensor, sum(lengths))

    return Pending(works, finish)


def _agree_on_rows(tensor: Tensor, row_bytes: int, group: dist.ProcessGroup, ranks: int) -> list[int]:
    """Returns how many rows each rank has. It blocks, so that the gather itself keeps its place in the order of collectives."""
    mine = torch.tensor([tensor.shape[0], row_bytes], device=tensor.device)
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    with _failures():
        dist.all_gather(everyone, mine, group)
    lengths, widths = zip(*(pair.tolist() for pair in everyone), strict=True)
    _same_rows(widths, "allgather")
    return list(lengths)


def start_broadcast(tensor: Tensor, root_rank: int, process_set: ProcessSet, in_place: bool = False) -> Pending:
    """Starts to send the tensor of `root_rank` (a rank of the job, not of the set) to all. in_place: the result is `tensor` itself."""
    group = group_of(process_set)
    if root_rank not in process_set.ranks:
        raise ValueError(f"root_rank {root_rank} is not one of the ranks {process_set.ranks}")
    source = tensor.detach()
    buffer = source if in_place and source.is_contiguous() else source.clone(memory_format=torch.contiguous_format)
    with _failures():
        works = [dist.broadcast(_bytes(buffer), root_rank, group, async_op=True)] if group and buffer.numel() else []
    return Pending(works, lambda: _delivered(buffer, tensor, in_place))


def _delivered(result: Tensor, tensor: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return result
    tensor.detach().copy_(result)  # no copy if result is the tensor's own memory
    return tensor


def start_alltoall(tensor: Tensor, splits: Tensor | Sequence[int] | None, process_set: ProcessSet) -> Pending:
    """Starts to send `splits[i]` rows to rank i of the set. The result is (rows received, number of rows from each rank)."""
    row_bytes, group = _row_bytes(tensor, "alltoall"), group_of(process_set)
    sent = _rows_to_send(tensor, splits, len(process_set.ranks))
    source = _bytes(tensor)[: sum(sent) * row_bytes]
    received = sent
    if group:
        offer = torch.tensor([[rows, row_bytes] for rows in sent], device=tensor.device)
        answer = torch.empty_like(offer)
        with _failures():
            dist.all_to_all_single(answer, offer, group=group)
        received = answer[:, 0].tolist()
        _same_rows(answer[:, 1].tolist(), "alltoall")
    output = source.new_empty(sum(received) * row_bytes) if group else source.clone()
    sizes = [rows * row_bytes for rows in received], [rows * row_bytes for rows in sent]
    with _failures():
        works = [dist.all_to_all_single(output, source, *sizes, group=group, async_op=True)] if group else []
    like = splits if isinstance(splits, Tensor) else torch.empty(0, dtype=torch.int32)

    def finish() -> tuple[Tensor, Tensor]:
        return _typed(output, tensor, sum(received)), like.new_tensor(received)

    return Pending(works, finish)


def _rows_to_send(tensor: Tensor, splits: Tensor | Sequence[int] | None, ranks: int) -> list[int]:
    rows = tensor.shape[0]
    if splits is None:
        if rows % ranks:
            raise ValueError(f"alltoall without splits needs a first dimension divisible by the {ranks} ranks, not {rows}")
        return [rows // ranks] * ranks
    sent = [int(n) for n in splits]
    if len(sent) != ranks or min(sent) < 0 or sum(sent) > rows:
        raise ValueError(f"splits {sent} must be {ranks} counts, one per rank, that add up to at most the {rows} rows")
    return sent


def start_reducescatter(tensor: Tensor, op: int, prescale: float, postscale: float, process_set: ProcessSet) -> Pending:
    """Starts a reduction whose result is this rank's share of the rows; the first ranks get one more if the rows do not divide evenly."""
    if op not in (Average, Sum, Adasum):  # the allreduce has its own message for Adasum
        raise ValueError(f"op is {op!r}; reducescatter has only hvd.Average and hvd.Sum")
    _row_bytes(tensor, "reducescatter")
    # torch.distributed scatters only equal shares, and padding would cut at other rows than Horovod does.
    whole = start_allreduce(tensor, op, prescale, postscale, process_set)
    me, (share, extra) = process_set.rank(), divmod(tensor.shape[0], len(process_set.ranks))
    assert me is not None  # start_allreduce raises if the set is not registered
    first, rows = me * share + min(me, extra), share + (me < extra)
    return Pending(whole.works, lambda: whole.finish().narrow(0, first, rows).clone())


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: Run, gradients: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(run(tensors))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(grads)


def differentiable(run: Run, gradients: Run, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns `run(tensors)`, differentiable: `gradients` maps the gradients of the results to the gradients of `tensors`."""
    return _Differentiable.apply(run, gradients, *tensors)
