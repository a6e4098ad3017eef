"""The interface by which `save` and `load` read and write the state of an object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .statefile import mapped

if TYPE_CHECKING:
    from ..exchange.transport import Transport

LOG = logging.getLogger("grace_ext")


class Saveable(NamedTuple):
    """Gives `save` and `load` access to an object's state; its method `_saveable()` returns one. The states are those of the ranks in this
    process: nested dictionaries of numpy arrays and JSON values, in which a driver's state is its Driver.state_dict()."""

    #: The ranks in this process, and the number of all ranks.
    ranks: Sequence[int]
    size: int
    #: Carries what the ranks tell each other; None if there are no other processes.
    transport: Transport | None
    #: The names of the nodes that `ranks` are on.
    nodes: Sequence[str]
    #: Returns the states of `ranks`.
    read: Callable[[], list[dict[str, Any]]]
    #: Raises GraceError if these states do not fit; changes nothing.
    check: Callable[[list[dict[str, Any]]], None]
    #: Replaces the states of `ranks`.
    write: Callable[[list[dict[str, Any]]], None]
    #: Names the shard of a sharded model that this is the exchange of; each shard has ranks of the same numbers. Empty for a whole model.
    shard: str = ""


def saveable_by(transport: Transport, read: Callable[[], dict], check: Callable[[dict], Any], write: Callable[[dict], None]) -> Saveable:
    """Returns the Saveable of one rank, whose state has arrays of the transport's `ops`."""
    ops = transport.ops
    return Saveable(
        [transport.rank],
        transport.size,
        transport,
        [transport.node],
        lambda: [mapped(read(), ops.host)],
        lambda states: check(mapped(states[0], ops.upload)),
        lambda states: write(mapped(states[0], ops.upload)),
    )


def nothing_saveable(alone: bool) -> Saveable:
    """Returns the Saveable of an object that exchanges nothing: `alone`, in a job of one rank, or on a rank that does not take part."""

    def left_out(states: list[dict[str, Any]]) -> None:
        LOG.warning("this rank exchanges nothing (one rank without simulate=True): the memory in the checkpoint is not loaded, and is lost")

    return Saveable([0] if alone else [], 1, None, [""] if alone else [], lambda: [{}], lambda states: None, left_out)
