"""The interface by which a driver is watched. `Observer` watches nothing; metrics/recorder.py has the one that measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..exchange.bucket import BucketExchange
from ..exchange.effects import Effects
from ..exchange.tensor import Watch
from ..parts.tensor import StepInfo

if TYPE_CHECKING:
    from ..exchange.transport import Transport
    from .layout import Bucket


class Observer:
    """Watches one driver. A generator that it is given must yield, receive and return the same through it."""

    #: Whether it judges by times, for which all ranks must watch alike.
    judges_times: bool = False

    def probe(self, transport: Transport) -> Effects:
        """Measures the network at the first step's agreement, if all ranks judge times."""
        return
        yield

    def begin(self, info: StepInfo) -> None:
        """A step begins."""

    def effects(self, effects: Effects) -> Effects:
        """Passes on the effects of the driver's `put` or `finish`."""
        return effects

    def bucket(self, exchange: BucketExchange) -> BucketExchange:
        """Passes on the exchange of one bucket."""
        return exchange

    def watch(self, name: str) -> Watch | None:
        """Returns what watches the exchange of this parameter's tensor, or None."""
        return None

    def ended(self, buckets: Sequence[Bucket]) -> None:
        """The step has ended and, if every gradient was finite, is committed."""

    def finished(self) -> None:
        """The driver's own work for the step is done, too."""
