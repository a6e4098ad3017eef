"""allreduce, sparse_allreduce and reducescatter of horovod.torch, over torch.distributed.

The blocking functions are differentiable; their gradients have the same factors as Horovod's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .channel import Collective
from .handles import differentiable, hand_out, start
from .move import grouped_allgather
from .pieces import Adasum, Average, Sum, allgather_piece, allreduce_piece, reducescatter_piece, reduction
from .world import ProcessSet, global_process_set


class Compressor:
    """A compression for `compression=` of a collective: makes a tensor smaller before the collective, and restores it afterwards."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Returns the tensor to send, and the `ctx` that decompress() needs."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Returns the tensor in its original dtype."""
        return tensor


class _HalfCompressor(Compressor):
    """Sends floating point tensors as float16."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Returns the tensor as float16 if it is floating point, and its dtype."""
        return tensor.half() if tensor.is_floating_point() else tensor, tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Returns the tensor in the dtype that it had before compress()."""
        assert ctx is not None  # compress() above always returns a dtype
        return tensor.to(ctx)


class Compression:
    """Horovod's own values for `compression=`: `none`, and `fp16`."""

    none = Compressor
    fp16 = _HalfCompressor


def _operation(op: int | None, average: bool | None) -> int:
    """Returns the op that `op`, or its deprecated predecessor `average`, asks for. Raises ValueError if both are given."""
    if average is None:
        return Average if op is None else op
    if op is not None:
        raise ValueError("give op or its predecessor average, not both")
    warnings.warn("average= is deprecated; use op=hvd.Average or op=hvd.Sum", DeprecationWarning, stacklevel=3)
    return Average if average else Sum


def _start_allreduce(
    kind: str, name: str | None, tensors: Sequence[Tensor], op: int, prescale: float, postscale: float, process_set: ProcessSet,
    in_place: bool = False,
) -> Collective:  # fmt: skip
    options = reduction(op, prescale, postscale)
    pieces = (allreduce_piece(tensor, op, prescale, postscale, process_set, in_place) for tensor in tensors)
    return start(kind, name, process_set, pieces, **options)


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts a reduction over the ranks and returns its handle. `op` defaults to Average."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return hand_out(_start_allreduce("allreduce", name, [tensor], *how))


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Like allreduce_async, but the result replaces `tensor` (once synchronized)."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return hand_out(_start_allreduce("allreduce", name, [tensor], *how, in_place=True))


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduces `tensor` over the ranks in place and returns it."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return _start_allreduce("allreduce", name, [tensor], *how, in_place=True).result()[0]


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Returns the tensor reduced over the ranks (`op` defaults to Average). The gradient is reduced in the same way."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return _allreduced("allreduce", name, [tensor], compression, *how)[0]


def _allreduced(
    kind: str, name: str | None, tensors: Sequence[Tensor], compression: type[Compressor], op: int, prescale: float, postscale: float,
    process_set: ProcessSet,
) -> list[Tensor]:  # fmt: skip
    small, contexts = zip(*(compression.compress(tensor) for tensor in tensors), strict=True)

    def reduced(tensors: Sequence[Tensor], name: str | None = None) -> Sequence[Tensor]:
        return _start_allreduce(kind, name, tensors, op, prescale, postscale, process_set).result()

    def reduced_gradients(grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return differentiable(reduced, reduced_gradients, grads)

    results = differentiable(lambda tensors: reduced(tensors, name), reduced_gradients, small)
    return [compression.decompress(result, context) for result, context in zip(results, contexts, strict=True)]


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Like allreduce_async for several tensors under one handle, whose result is a tuple."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return hand_out(_start_allreduce("grouped_allreduce", name, tensors, *how), grouped=True)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Like allreduce_async_ for several tensors under one handle, whose result is a tuple."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return hand_out(_start_allreduce("grouped_allreduce", name, tensors, *how, in_place=True), grouped=True)


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> tuple[Tensor, ...]:
    """Like allreduce_ for several tensors."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return _start_allreduce("grouped_allreduce", name, tensors, *how, in_place=True).result()


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Like allreduce for several tensors."""
    how = _operation(op, average), prescale_factor, postscale_factor, process_set
    return _allreduced("grouped_allreduce", name, tensors, compression, *how)


def sparse_allreduce_async(tensor: Tensor, name: str, op: int, process_set: ProcessSet = global_process_set) -> Callable[[], Tensor]:
    """Starts the reduction of a sparse COO tensor (Sum or Average). Returns a function that waits and returns the result."""
    if op not in (Average, Sum):
        raise ValueError(f"op is {op!r}; a sparse reduction has only hvd.Average and hvd.Sum")
    if not tensor.is_sparse:
        raise ValueError(
            f"sparse_allreduce_async takes COO tensors, not layout {tensor.layout}; use hvd.allreduce_async, or tensor.to_sparse()"
        )
    options = {**reduction(op, 1.0, 1.0), "shape": tuple(tensor.shape)}
    pieces = (allgather_piece(part) for part in (tensor._indices().t(), tensor._values()))
    collective = start("sparse_allreduce", name, process_set, pieces, **options)
    collective.channel.launch_in_background()

    def handle() -> Tensor:
        indices, values = collective.result()
        values = values / process_set.size() if op == Average else values
        return torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=False)

    return handle


def _start_reducescatter(
    kind: str, name: str | None, tensors: Sequence[Tensor], op: int, prescale: float, postscale: float, process_set: ProcessSet
) -> Collective:
    if op not in (Average, Sum, Adasum):  # `reduction` has its own message for Adasum
        raise ValueError(f"op is {op!r}; reducescatter has only hvd.Average and hvd.Sum")
    options = reduction(op, prescale, postscale)
    pieces = (reducescatter_piece(tensor, op, prescale, postscale, process_set) for tensor in tensors)
    return start(kind, name, process_set, pieces, **options)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Starts a reduction (Average or Sum) whose result is this rank's share of the rows; returns the handle."""
    return hand_out(_start_reducescatter("reducescatter", name, [tensor], op, prescale_factor, postscale_factor, process_set))


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Returns this rank's share of the rows of the reduced tensor (Average or Sum)."""
    how = op, prescale_factor, postscale_factor, process_set
    return _reducescattered("reducescatter", name, [tensor], compression, *how)[0]


def _reducescattered(
    kind: str, name: str | None, tensors: Sequence[Tensor], compression: type[Compressor], op: int, prescale: float, postscale: float,
    process_set: ProcessSet,
) -> list[Tensor]:  # fmt: skip
    small, contexts = zip(*(compression.compress(tensor) for tensor in tensors), strict=True)
    factor = prescale * postscale * (len(process_set.ranks) if op == Sum else 1)

    def scattered(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return _start_reducescatter(kind, name, tensors, op, prescale, postscale, process_set).result()

    def gathered_gradients(grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grouped_allgather([grad * factor for grad in grads], process_set=process_set)

    results = differentiable(scattered, gathered_gradients, small)
    return [compression.decompress(result, context) for result, context in zip(results, contexts, strict=True)]


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Like reducescatter_async for several tensors under one handle, whose result is a tuple."""
    return hand_out(
        _start_reducescatter("grouped_reducescatter", name, tensors, op, prescale_factor, postscale_factor, process_set), grouped=True
    )


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """Like reducescatter for several tensors."""
    how = op, prescale_factor, postscale_factor, process_set
    return _reducescattered("grouped_reducescatter", name, tensors, compression, *how)
