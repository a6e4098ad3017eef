"""What local-update training does, checked against the parts that it is to do it with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .. import communicators
from ..composition.grace import Grace
from ..composition.making import grace
from ..compressors.base import Compressor
from ..errors import IncompatiblePartsError, ParameterError, UnsupportedError
from ..memories.base import Memory
from ..memories.cser import CSER
from .schedule import Schedule, schedule_of, whole


@dataclass(frozen=True)
class Settings:
    """One training's choices; the same on all ranks, but for the schedule of an asynchronous one. Make it with `settings_of`."""

    grace: Grace
    schedule: Schedule
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    asynchronous: bool = False
    max_ahead: int = 1000
    timeout: float = 300.0

    @property
    def has_outer(self) -> bool:
        """An outer optimizer that does more than to take the mean."""
        return (self.outer_lr, self.outer_momentum) != (1.0, 0.0)

    @property
    def lossless(self) -> bool:
        """Nothing is compressed: then models are averaged instead of their drifts, which is the same without a rounding."""
        return (self.grace.compressor.name, self.grace.memory.name) == ("none", "none") and not self.asynchronous

    @property
    def by_gradients(self) -> bool:
        """All steps exchange gradients: CSER, whose memory is in between; and averages at every step without loss, where averaging the
        gradients is the same but for rounding, and is plain data-parallel training bit for bit."""
        return self.grace.memory.diverges or (self.lossless and self.schedule.gap == 1 and not self.has_outer)

    def resets(self, step: int) -> bool:
        """Whether step `step`, from 0, is one of CSER's error resets, with more collectives than other steps have."""
        return self.grace.memory.diverges and (step + 1) % self.schedule.gap == 0

    @property
    def for_gradients(self) -> Grace:
        """What gradients are exchanged with, in steps where they are."""
        if self.grace.memory.diverges:
            return self.grace
        return grace("none @ hierarchical" if self.grace.two_level else "none")

    @property
    def for_models(self) -> Grace:
        """What drifts are exchanged with (CSER's models, dense)."""
        return grace("none") if self.grace.memory.diverges else self.grace

    def __str__(self) -> str:
        """What ranks compare: equal plans on all of them."""
        when = f"asynchronous, max_ahead={self.max_ahead}" if self.asynchronous else str(self.schedule)
        outer = f", outer_lr={self.outer_lr!r}, outer_momentum={self.outer_momentum!r}" if self.has_outer else ""
        return f"LocalSGD({when}{outer}) of {self.grace}"


def settings_of(
    compression: Any = None,
    *,
    every: int | None = None,
    schedule: Any = None,
    max_gap: int | None = None,
    asynchronous: bool = False,
    max_ahead: int = 1000,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    timeout: float = 300.0,
) -> Settings:
    """The settings for what a user gives; see `LocalSGD` of the frameworks. Raises ParameterError, or IncompatiblePartsError or
    UnsupportedError for parts that cannot work here."""
    chosen = grace("none" if compression is None else compression)
    if chosen.policy is not None:
        raise UnsupportedError(f"{chosen} chooses by tensor or step, and LocalSGD sends all drifts through one composition: name that")
    if isinstance(chosen.memory, CSER):
        every = chosen.memory.reset_period if every is None else every
        if schedule is not None or every != chosen.memory.reset_period:
            raise ParameterError(f"memory {chosen.memory} says itself when the models are drawn together: leave out every= and schedule=")
    when = schedule_of(every, schedule, max_gap)
    _number("outer_lr", outer_lr, 0.0, math.inf, above=True)
    _number("outer_momentum", outer_momentum, 0.0, 1.0)
    _number("timeout", timeout, 0.0, math.inf, above=True)
    settings = Settings(chosen, when, outer_lr, outer_momentum, bool(asynchronous), whole("max_ahead", max_ahead, 0), timeout)
    _check(settings)
    return settings


def _number(what: str, value: Any, low: float, high: float, above: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high and not (above and value == low)
    if not valid:
        raise ParameterError(f"{what} must be a number {'above' if above else 'from'} {low:g}, below {high:g}, got {value!r}")


def _check(settings: Settings) -> None:
    """What is exchanged is a drift, in units of the model, and not a gradient."""
    compressor, memory = settings.grace.compressor, settings.grace.memory
    if memory.diverges:
        if settings.has_outer or settings.asynchronous:
            raise IncompatiblePartsError(f"memory {memory.name!r} has no outer optimizer and no asynchronous form; use memory 'residual'")
        return
    if compressor.result != "mean":
        raise IncompatiblePartsError(
            f"LocalSGD averages how far models have moved, and the result of {compressor.name!r} has no size; use compressor 'efsignsgd' "
            "(signs with a scale)"
        )
    if memory.is_momentum or memory.uses_lr:
        why = "is the momentum of the training" if memory.is_momentum else "multiplies with the learning rate"
        raise IncompatiblePartsError(
            f"memory {memory.name!r} {why}, and what LocalSGD sends is the sum of local steps, which have both in them already; use memory "
            "'residual'"
        )
    if settings.grace.communicator.uses_lr:
        raise IncompatiblePartsError(f"{settings.grace.communicator} follows the learning rate, which a drift has in it already")
    if settings.asynchronous:
        _check_asynchronous(settings)


def _check_asynchronous(settings: Settings) -> None:
    compressor, memory, communicator = settings.grace.compressor, settings.grace.memory, settings.grace.communicator
    if settings.has_outer or settings.schedule.start:
        raise UnsupportedError(
            "asynchronous=True has no step that all ranks make together, which an outer optimizer and post_local need; leave them out"
        )
    own = type(memory).exchange is Memory.exchange and type(memory).on_aggregate is Memory.on_aggregate
    if compressor.shared_state or not own:
        raise IncompatiblePartsError(
            f"{memory if not own else compressor} works with what all ranks have at one step, and asynchronous ranks have no common step; "
            "use topk, qsgd, efsignsgd or another compressor without such a state, and memory 'residual'"
        )
    if type(compressor).exchange is not Compressor.exchange or communicator.name not in ("allreduce", "allgather", "broadcast"):
        part = compressor if type(compressor).exchange is not Compressor.exchange else communicator
        raise IncompatiblePartsError(
            f"asynchronous ranks send each other whole messages, and {part.name!r} needs all ranks at once; use a compressor without "
            "rounds of its own, and communicator 'allgather'"
        )
    with_allgather(settings.grace)


def with_allgather(g: Grace) -> Grace:
    """The same compressor and memory, as messages that any rank can decode by itself."""
    return Grace(dataclasses.replace(g.route, communicator=communicators.get("allgather").create()), g.seed)
