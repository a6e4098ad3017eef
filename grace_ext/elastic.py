"""Elastic jobs: an exchange's memory when ranks leave and join. For every framework; grace_ext/resize.py has the equations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ParameterError
from .resize import HOW, resized

LOG = logging.getLogger("grace_ext")
STALE = (
    "this optimizer exchanges among {} ranks, and Horovod has {} now: in an elastic job use hvd.elastic.run and the states of "
    "grace_ext.frameworks.{{torch,tensorflow}}.elastic, which bring the compression's memory to the new ranks"
)


def check_how(how: str) -> str:
    """Raises ParameterError for what `resized` does not know."""
    if how not in HOW:
        raise ParameterError(f"resize must be one of {', '.join(map(repr, HOW))}, got {how!r}")
    return how


def carried_over(
    gather: Callable[[Any], list[Any]], own: Mapping[str, Any] | None, rank: int, size: int, how: str
) -> dict[str, Any] | None:
    """This rank's Driver.state_dict() in the new world of `size` ranks; None where no rank has any. Collective.

    own: this rank's state_dict of the old world, with numpy arrays; None on a rank that has just joined.
    gather: gives every rank's object by (new) rank. One parameter's arrays of all ranks are in memory at a time.
    how: see `resized`. The memory of a rank that died is lost with it: its share of what was unsent counts as zero.
    """
    about = {key: value for key, value in (own or {}).items() if key != "state"}
    heads = gather((about, list(own["state"])) if own else None)
    there = [head for head in heads if head]
    if not there:
        return None
    if own and all(head and (head[0]["rank"], head[0]["size"]) == (place, size) for place, head in enumerate(heads)):
        return dict(own)  # the same ranks as before
    old = there[0][0]["size"]
    if rank == 0:
        lost = f"; the memory of {old - len(there)} ranks is lost with them" if old > len(there) else ""
        LOG.warning("%d of %d ranks went on in a world of %d: their memory is resized (%s)%s", len(there), old, size, how, lost)
    state: dict[str, Any] = {}
    for parameter in dict.fromkeys(key.split("/", 1)[1] for key in there[0][1]):
        mine = {key: array for key, array in own["state"].items() if key.split("/", 1)[1] == parameter} if own else None
        of_all = [part for part in gather(mine) if part is not None]
        states = [{**head, "state": part} for (head, _), part in zip(there, of_all, strict=True)]
        state.update(resized(states, size, how)[rank]["state"])
    return {**there[0][0], "rank": rank, "size": size, "state": state}
