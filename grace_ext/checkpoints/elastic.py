"""Carries an exchange's state over when ranks leave and join an elastic job, for every framework. Equations: checkpoints/resize.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..communicators.shards import shard_of
from ..composition.grace import Grace
from ..composition.making import grace
from ..errors import ParameterError, shown
from ..exchange.transport import this_node
from .resize import HOW, resized

LOG = logging.getLogger("grace_ext")
STALE = (
    "this optimizer exchanges among {} ranks, but Horovod has {} now: in an elastic job use hvd.elastic.run and the states of "
    "grace_ext.frameworks.{{torch,tensorflow}}.elastic, which bring the compression's memory to the new ranks"
)


def check_how(how: str) -> str:
    """Returns `how`. Raises ParameterError if `resized` does not know it."""
    if how not in HOW:
        raise ParameterError(f"resize must be one of {', '.join(map(repr, HOW))}, got {shown(how)}")
    return how


def carried_over(
    gather: Callable[[Any], list[Any]], own: Mapping[str, Any] | None, rank: int, size: int, how: str
) -> dict[str, Any] | None:
    """Returns this rank's Driver.state_dict() in the new world of `size` ranks; None if no rank has any. Collective.

    own: this rank's state_dict of the old world, with numpy arrays, and 'sizes', the elements of each parameter by name; None on a rank
      that has just joined.
    gather: returns every rank's object, by (new) rank. The arrays of one parameter at a time, of all ranks, are in memory.
    how: see `resized`. The state of a rank that died is lost with it: what it had not sent counts as zero.
    """
    about = {key: value for key, value in (own or {}).items() if key != "state"}
    said = gather((this_node(), about, list(own["state"]) if own else []))
    nodes, heads = [node for node, _, _ in said], [(head, keys) if head else None for _, head, keys in said]
    there = [head for head in heads if head]
    if not there:
        return None
    sizes = there[0][0]["sizes"]
    there = [({key: value for key, value in head.items() if key != "sizes"}, keys) for head, keys in there]
    if own and all(head and (head[0]["rank"], head[0]["size"]) == (place, size) for place, head in enumerate(heads)):
        return {key: value for key, value in own.items() if key != "sizes"}  # the same ranks as before
    old = there[0][0]["size"]
    if rank == 0:
        lost = f"; the memory of {old - len(there)} ranks is lost with them" if old > len(there) else ""
        LOG.warning("%d of %d ranks continue in a world of %d: their memory is resized (%s)%s", len(there), old, size, how, lost)
    made = resized([{**head, "state": {}} for head, _ in there], size, how, nodes)[rank]
    state: dict[str, Any] = {}
    for parameter in dict.fromkeys(key.split("/", 1)[1] for key in there[0][1]):
        mine = {key: array for key, array in own["state"].items() if key.split("/", 1)[1] == parameter} if own else None
        of_all = [part for part in gather(mine) if part is not None]
        if len(there) < old:
            ranks = [head["rank"] for head, _ in there]
            mine = _shards(grace(there[0][0]["spec"]), ranks, of_all, (parameter, sizes[parameter]), (old, size), rank, how)
            of_all = [{key: array for key, array in part.items() if key not in mine} for part in of_all]
            state.update(mine)
        states = [{**head, "state": part} for (head, _), part in zip(there, of_all, strict=True)]
        state.update(resized(states, size, how, nodes)[rank]["state"])
    return {**made, "state": state}


def _shards(
    g: Grace, ranks: Sequence[int], of_all: Sequence[dict[str, Any]], parameter: tuple[str, int], sizes: tuple[int, int], rank: int,
    how: str,
) -> dict[str, Any]:  # fmt: skip
    """Returns the new rank's shards of those arrays of a parameter, given by name and elements, of which ranks hold shards
    (reduce_scatter's), made from the shards of these old `ranks`. The shards of ranks that died are zero."""
    (name, elements), (old, new) = parameter, sizes
    sharded = {key for leaf in g.leaves for key in leaf.communicator.sharded_state}
    mine = {}
    for key in [key for key in of_all[0] if key.split("/", 1)[0] in sharded]:
        whole = np.zeros(elements, of_all[0][key].dtype)
        for its_rank, arrays in zip(ranks, of_all, strict=True):
            whole[shard_of(name, elements, old, its_rank)] = arrays[key]
        piece = whole[shard_of(name, elements, new, rank)]
        mine[key] = np.zeros_like(piece) if how == "reset" else piece.copy()
    return mine
