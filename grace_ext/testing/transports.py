"""Tests that every transport must pass. See `transport_contract`; transport_checks.py has the checks."""

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
    """Returns a class of tests for a transport whose ranks can live in the threads of one process. Assign it to a name that begins with
    Test.

    start: gets a number of ranks and returns a connected transport for each, in rank order. All ranks run every check of `check_transport`
    at once, with 1, 2 and 3 ranks.
    """
    every = pytest.mark.parametrize(("size", "check"), [pytest.param(n, c, id=f"{n}-{c.__name__}") for n in SIZES for c in CHECKS])

    @every
    def test_all_ranks(self: Any, size: int, check: Callable[[Transport], None]) -> None:
        together(start(size), check)

    return type("TestTransportContract", (), {"test_all_ranks": test_all_ranks})


def together(transports: Sequence[Transport], check: Callable[[Transport], None]) -> None:
    """Runs a check on all ranks, each in a thread. Raises what any of them raised, or an AssertionError if they do not end in time."""
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
