"""Recognizes torch.distributed.checkpoint (DCP) as the caller.

DCP writes what is not sharded once, from any one rank, and gives it to all. Memory differs by rank, so it must not be among that;
`DistributedState` gives it to DCP by rank.
"""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from ...driver.driver import Driver
from ...errors import UnsupportedError

LOG = logging.getLogger("grace_ext")
DCP = "torch.distributed.checkpoint"
LOST = (
    "%s: torch.distributed.checkpoint saves and loads this optimizer without the memory of compression, which differs by rank. Make "
    "memory = hvd.DistributedState(optimizer) first, and pass {'grace_ext': memory, ...} to dcp.save and dcp.load; or call grace_ext.save "
    "and grace_ext.load as well"
)

_kept: WeakSet[Driver] = WeakSet()  # the drivers whose state a DistributedState keeps
_warned: WeakSet[Driver] = WeakSet()


def called_by_dcp() -> str | None:
    """Returns the user's file and line if this call comes from a function of torch.distributed.checkpoint, else None."""
    inside, where = False, ""
    for frame, line in traceback.walk_stack(None):
        name = frame.f_globals.get("__name__", "")
        if name.startswith(DCP):
            inside, where = True, ""  # it may be called from further inside, too
        elif inside and not where and not name.startswith("torch."):
            where = f"{frame.f_code.co_filename}:{line}"
    return where if inside else None


def keep(drivers: Iterable[Driver]) -> None:
    """Takes note that a DistributedState keeps the state of these drivers."""
    _kept.update(drivers)


def leaves_out(optimizer: Any) -> bool:
    """Whether DCP reads this optimizer's state, so that its memory must be left out. Rank 0 warns once if there is no DistributedState."""
    where = called_by_dcp()
    for driver in optimizer._drivers() if where is not None else ():
        if driver not in _kept and driver not in _warned:
            _warned.add(driver)
            # Not by a warning: if warnings are errors, rank 0 alone would raise, and the others would wait for it.
            if driver.transport.rank == 0:
                LOG.warning(LOST, where)
    return where is not None


class OfOneRank(dict[str, Any]):
    """The state of one rank, as a script gets it from `state_dict()`. It refuses to be read by DCP in a job of several ranks: DCP would mix
    the ranks' states. Saved by torch.save, or copied, it is a plain ordered dictionary."""

    def items(self) -> Any:
        where = called_by_dcp() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
        if where is not None:
            raise UnsupportedError(
                f"{where}: {DCP} gives one rank's state to all, and this one, which state_dict() returned to the script, differs by rank: "
                "leave it out, and pass memory = hvd.DistributedState(optimizer) in its place"
            )
        return super().items()

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(dict.items(self))  # a class that torch.load takes with weights_only=True


def refuse_dcp(what: str, instead: str) -> None:
    """Raises UnsupportedError if DCP reads the state of `what`, which it would lose."""
    where = called_by_dcp()
    if where is not None:
        raise UnsupportedError(f"{where}: {DCP} gives one rank's state to all, and {what} differs by rank: {instead}")
