"""Starts collectives of pieces (pieces.py makes them), keeps those that have a handle until they are synchronized, and makes blocking ones
differentiable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .channel import Collective, Piece
from .world import ProcessSet, channel_of

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_pending: dict[int, tuple[Collective, bool]] = {}
_handles = itertools.count(1)


def start(kind: str, name: str | None, process_set: ProcessSet, pieces: Iterable[Piece], **options: Any) -> Collective:
    """Starts a collective of these pieces. The ranks compare its kind, name and options."""
    channel = channel_of(process_set)
    return channel.start(Collective(channel, kind, name, options, list(pieces)))


def hand_out(collective: Collective, grouped: bool = False) -> int:
    """Keeps a started collective; returns the handle for poll() and synchronize(). grouped: its result is a tuple."""
    handle = next(_handles)
    _pending[handle] = collective, grouped
    collective.channel.launch_in_background()
    return handle


def poll(handle: int) -> bool:
    """Whether the collective of this handle is done, so that synchronize() will not block."""
    if handle not in _pending:
        raise ValueError(f"handle {handle} was synchronized already, or never existed")
    collective, _ = _pending[handle]
    if not collective.done():
        return False
    collective.channel.forget(collective)
    return True


def synchronize(handle: int) -> Any:
    """Waits for the collective of this handle and returns its result; None if the handle was synchronized before."""
    if handle not in _pending:
        return None
    collective, grouped = _pending.pop(handle)
    results = collective.result()
    return results if grouped else results[0]


def differentiable(run: Run, gradients: Run, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns `run(tensors)`, differentiable: `gradients` maps the gradients of the results to the gradients of `tensors`."""
    return _Differentiable.apply(run, gradients, *tensors)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: Run, gradients: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.gradients = gradients
        return tuple(run(tensors))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(grads)
