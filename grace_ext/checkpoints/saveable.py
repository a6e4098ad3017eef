"""TODO."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .statefile import mapped

if TYPE_CHECKING:
    from ..exchange.transport import Transport

LOG = logging.getLogger("grace_ext")


class Saveable(NamedTuple):
    """What an object with state gives to `save` and `load` (its method `_saveable()`): states of the ranks that live in this process, as
    nested dictionaries of numpy arrays and JSON values, in which those of drivers are as Driver.state_dict has them."""

    ranks: Sequence[int]
    size: int
    #: By which the ranks tell each other; None where there are no other processes.
    transport: Transport | None
    read: Callable[[], list[dict[str, Any]]]
    #: Raises GraceError where these states do not fit, and changes nothing.
    check: Callable[[list[dict[str, Any]]], None]
    write: Callable[[list[dict[str, Any]]], None]


def saveable_by(transport: Transport, read: Callable[[], dict], check: Callable[[dict], Any], write: Callable[[dict], None]) -> Saveable:
    """Of one rank in this process, whose state has arrays of the transport's `ops`."""
    ops = transport.ops
    return Saveable(
        [transport.rank],
        transport.size,
        transport,
        lambda: [mapped(read(), ops.host)],
        lambda states: check(mapped(states[0], ops.upload)),
        lambda states: write(mapped(states[0], ops.upload)),
    )


def nothing_saveable(alone: bool) -> Saveable:
    """Of an object that exchanges nothing: of a job of one rank, which is `alone`, or on a rank that does not take part."""

    def left_out(states: list[dict[str, Any]]) -> None:
        LOG.warning("this rank exchanges nothing (one rank without simulate=True): the memory in the checkpoint is left out, and is lost")

    return Saveable([0] if alone else [], 1, None, lambda: [{}], lambda states: None, left_out)
