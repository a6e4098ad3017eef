"""The contract that every transport keeps, as tests for pytest. See `transport_contract`; transport_checks.py has the checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ..exchange.transport import Transport
from .transport_checks import CHECKS

SIZES = (1, 2, 3)
#: Seconds that one check of all ranks may take.
PATIENCE = 60.0


def transport_contract(start: Callable[[int], Sequence[Transport]]) -> type:
    """Returns a class of tests for a transport whose ranks can live in the threads of one process: assign it to a name that begins with
    Test.

    start: called with a number of ranks, returns a connected transport for each, in rank order. Every check of `check_transport` is run by
    all ranks at once, for 1, 2 and 3 of them.
    """
    every = pytest.mark.parametrize(("size", "check"), [pytest.param(n, c, id=f"{n}-{c.__name__}") for n in SIZES for c in CHECKS])

    @every
    def test_all_ranks(self: Any, size: int, check: Callable[[Transport], None]) -> None:
        together(start(size), check)

    return type("TestTransportContract", (), {"test_all_ranks": test_all_ranks})


def together(transports: Sequence[Transport], check: Callable[[Transport], None]) -> None:
    """Runs a check on all ranks, each in a thread; raises what any of them raised, or if they do not end in time."""
    errors: list[BaseException] = []

    def run(transport: Transport) -> None:
        try:
            check(transport)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(transport,), daemon=True) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if errors:
        raise errors[0]
    hang = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    assert not hang, f"ranks {hang} of {len(threads)} did not come back within {PATIENCE:g} s"
