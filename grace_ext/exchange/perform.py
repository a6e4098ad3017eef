"""Performs a driver's effects on a transport: one rank of a real job."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import Afterwards, GraceError
from ..parts.tensor import TensorSpec
from .effects import Collective, Effects, Split, Start, Wait
from .transport import Transport


def perform(effects: Effects, transport: Transport, handles: dict[str, Any]) -> Any:
    """Performs the effects and returns what their generator returns. `handles`: the collectives under way, kept between calls."""
    answer = None
    with Afterwards(effects.close):  # so that an engine's error reaches the driver at once
        while True:
            try:
                effect = effects.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = None
            if isinstance(effect, Start):
                among = transport.among(effect.collective.group)
                with naming_failures(transport, effect.name, effect.parameters):
                    handles[effect.name] = among, among and among.start(effect.collective, effect.name)
            elif isinstance(effect, Split):
                transport.split(effect.groups)
            else:
                among, handle = handles.pop(effect.name)
                with naming_failures(transport, effect.name, effect.parameters):
                    answer = among.wait(handle) if among else None


@contextmanager
def naming_failures(transport: Transport, name: str, parameters: Sequence[TensorSpec] = ()) -> Iterator[None]:
    """Turns an engine's error, which says little, into the transport's CollectiveError, which names collective and parameters."""
    try:
        yield
    except GraceError:
        raise
    except RuntimeError as error:
        raise transport.failure(str(error), name, [spec.name for spec in parameters], transport.rank) from error


def at_once(transport: Transport, wanted: Collective, name: str) -> Effects:
    """Starts one collective, waits for it, and returns its result. A generator of effects."""
    carried = transport.carry(wanted)
    answer = None
    for turn in itertools.count():
        try:
            collective = carried.send(answer)
        except StopIteration as stop:
            return stop.value
        yield Start(f"{name}/{turn}", collective)
        answer = yield Wait(f"{name}/{turn}")
    raise AssertionError("unreachable")
