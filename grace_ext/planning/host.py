"""Computes what copies between a GPU and the host add to a step, if the exchange passes through the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ParameterError, shown
from .trace import GATHERS, Event

#: What may be copied (see HostCopies).
COPIED = ("gradients", "collectives")


@dataclass(frozen=True)
class HostCopies:
    """Describes the copies of one worker between its GPU and the host. They are taken to overlap with nothing.

    rate: bits per second of a copy in one direction, as one GPU has it while all GPUs of its node copy.
    copied: 'gradients' are copied to the host and back by every candidate but dense, as in TensorFlow, whose dense gradients NCCL reduces
      on the GPUs; or 'collectives' copy what they take to the host, and what they give back to the GPU, for dense gradients too, as torch
      does over Gloo.
    nbytes: bytes of one worker's gradients."""

    rate: float
    copied: str
    nbytes: int

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise ParameterError(f"the rate of copies must be a positive number of bits per second, got {shown(self.rate)}")
        if self.copied not in COPIED:
            raise ParameterError(f"{shown(self.copied)} is not what is copied between GPU and host: give one of {', '.join(COPIED)}")

    def seconds(self, nbytes: float) -> float:
        """Returns the seconds in which this many bytes are copied in one direction."""
        return 8 * nbytes / self.rate


def received(event: Event, n: int) -> float:
    """Returns the bytes that a collective of n ranks gives to each: every rank's payload if it gathers, else as many as it takes."""
    return event.nbytes * (n if event.kind in GATHERS else 1)


def started(events: Sequence[Event]) -> list[Event]:
    """Returns the events that start a collective."""
    return [event for event in events if event.what == "start"]
