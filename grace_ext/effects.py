"""The effects that a driver's generators yield: what they ask of the network, which they never touch themselves."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .exchange import Collective
    from .frameworks.base import Transport
    from .parts.tensor import TensorSpec


class Start(NamedTuple):
    """`parameters`: whose gradients the collective carries, for what an error says."""

    name: str
    collective: Collective
    parameters: Sequence[TensorSpec] = ()


class Wait(NamedTuple):
    """For what was started under this name; parameters as there."""

    name: str
    parameters: Sequence[TensorSpec] = ()


class Split(NamedTuple):
    """Makes the groups of an exchange in two levels, on all ranks: `groups` of ranks, the last of which has the first of every other."""

    groups: list[list[int]]


Effects = Generator[Any, Any, Any]


def at_once(transport: Transport, wanted: Collective, name: str) -> Effects:
    """The result of one collective, started and waited for."""
    carried = transport.carry(wanted)
    answer = None
    for turn in itertools.count():
        try:
            collective = carried.send(answer)
        except StopIteration as stop:
            return stop.value
        yield Start(f"{name}/{turn}", collective)
        answer = yield Wait(f"{name}/{turn}")
