"""The settings of local-update training, checked against the parts that it uses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .. import communicators
from ..composition.composition import Composition, Parts
from ..composition.grace import Grace
from ..composition.making import grace
from ..compressors.base import Compressor
from ..errors import IncompatiblePartsError, ParameterError, UnsupportedError, shown
from ..memories.base import Memory
from ..memories.cser import CSER
from ..parts.tensor import TensorSpec
from .schedule import Schedule, schedule_of, whole


@dataclass(frozen=True)
class Settings:
    """Holds one training's settings, which are the same on all ranks (asynchronous ranks may differ in schedule). Made by `settings_of`."""

    grace: Grace
    schedule: Schedule
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    asynchronous: bool = False
    max_ahead: int = 1000
    timeout: float = 300.0

    @property
    def has_outer(self) -> bool:
        """Whether the outer optimizer does more than take the mean."""
        return (self.outer_lr, self.outer_momentum) != (1.0, 0.0)

    @property
    def diverges(self) -> bool:
        """Whether the memory is CSER, with which the ranks' models differ after a step that exchanges gradients."""
        return self.grace.diverges

    @property
    def lossless(self) -> bool:
        """Whether nothing is compressed: then models are averaged instead of drifts, which is the same with one rounding less."""
        return all(leaf.plain for leaf in self.grace.leaves) and not self.asynchronous

    @property
    def by_gradients(self) -> bool:
        """Whether all steps exchange gradients: with CSER, which works on gradients; and if nothing is compressed and every step
        synchronizes. Then it equals averaging models, except for rounding, and is plain data-parallel training bit for bit."""
        return self.diverges or (self.lossless and self.schedule.gap == 1 and not self.has_outer)

    def resets(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is one of CSER's error resets, which have more collectives than other steps."""
        return self.diverges and (step + 1) % self.schedule.gap == 0

    @property
    def for_gradients(self) -> Grace:
        """Returns the Grace for steps that exchange gradients."""
        if self.diverges:
            return self.grace
        return grace("none @ hierarchical" if self.grace.two_level else "none")

    @property
    def for_models(self) -> Grace:
        """Returns the Grace for drifts (dense for CSER, which sends models)."""
        return grace("none") if self.diverges else self.grace

    def __str__(self) -> str:
        """Returns the text that the ranks compare, and that a state is saved with."""
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
    """Returns the settings for a user's options; see `LocalSGD` of the frameworks. Raises ParameterError, or IncompatiblePartsError or
    UnsupportedError for parts that cannot work here."""
    chosen = grace("none" if compression is None else compression)
    if chosen.privacy is not None:
        raise UnsupportedError(
            f"{chosen} makes each step's gradient private, but LocalSGD makes steps with gradients that are not and sends what they add up "
            "to: use DistributedOptimizer(privacy=...), or Exchange, which exchange every step"
        )
    if chosen.policy is not None and chosen.diverges:
        memory = next(memory for memory in chosen.memories if memory.diverges)
        raise IncompatiblePartsError(
            f"{chosen}: with memory {memory} every step exchanges gradients, by one schedule, and with other memories only "
            f"synchronizations exchange anything; name one composition with {memory.name!r} for all tensors, or use memory 'residual'"
        )
    cser = chosen.memories[0]
    if isinstance(cser, CSER):
        every = cser.reset_period if every is None else every
        if schedule is not None or every != cser.reset_period:
            raise ParameterError(f"memory {cser} sets the schedule by its reset_period: leave out every= and schedule=")
    when = schedule_of(every, schedule, max_gap)
    _number("outer_lr", outer_lr, 0.0, 1e308, above=True)
    _number("outer_momentum", outer_momentum, 0.0, 1.0)
    _number("timeout", timeout, 0.0, 1e9, above=True)  # sockets take no more than some centuries
    if not isinstance(asynchronous, bool):
        raise ParameterError(f"asynchronous must be True or False, got {shown(asynchronous)}")
    settings = Settings(chosen, when, outer_lr, outer_momentum, asynchronous, whole("max_ahead", max_ahead, 0), timeout)
    _check(settings)
    return settings


def _number(what: str, value: Any, low: float, high: float, above: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high and not (above and value == low)
    if not valid:
        raise ParameterError(f"{what} must be a number {'above' if above else 'from'} {low:g}, below {high:g}, got {shown(value)}")


def _check(settings: Settings) -> None:
    """Raises an error if the parts cannot exchange drifts, which have the units of the model, not of a gradient."""
    if settings.diverges:
        if settings.has_outer or settings.asynchronous:
            (memory,) = settings.grace.memories
            raise IncompatiblePartsError(f"memory {memory.name!r} has no outer optimizer and no asynchronous form; use memory 'residual'")
        return
    for policy in settings.grace.policies:
        policy.check_drifts()
    for leaf in settings.grace.leaves:
        _check_leaf(leaf)
    if settings.asynchronous:
        _check_asynchronous(settings)


def _check_leaf(leaf: Composition) -> None:
    """Raises IncompatiblePartsError if a composition cannot exchange drifts."""
    compressor, memory = leaf.compressor, leaf.memory
    if compressor.result != "mean":
        raise IncompatiblePartsError(
            f"LocalSGD averages how far models have moved, but the result of {compressor.name!r} has no size; use compressor 'efsignsgd' "
            "(signs with a scale)"
        )
    if memory.is_momentum or memory.optimizer_momentum is not None or memory.uses_lr:
        why = "multiplies with the learning rate" if memory.uses_lr else "is the momentum of the training, or compresses it"
        raise IncompatiblePartsError(
            f"memory {memory.name!r} {why}, but LocalSGD sends the sum of local steps, which already contain both; use memory 'residual'"
        )
    if leaf.communicator.uses_lr:
        raise IncompatiblePartsError(
            f"{leaf.communicator} follows the learning rate, which a drift already contains; use follow_rate=False"
        )


def _check_asynchronous(settings: Settings) -> None:
    if settings.has_outer or settings.schedule.start:
        raise UnsupportedError(
            "an outer optimizer and post_local need a step that all ranks make together, and asynchronous=True has none; leave them out"
        )
    learner = next((policy for policy in settings.grace.policies if policy.learns), None)
    if learner is not None:
        raise IncompatiblePartsError(
            f"policy {learner.name!r} learns from what all ranks send at one step, but asynchronous ranks have no common step; use a "
            "policy that goes by name, size or the number of the message (by_name, by_size, warmup, ratio_warmup, every), or leave out "
            "asynchronous=True"
        )
    for leaf in settings.grace.leaves:
        _check_leaf_asynchronous(leaf)


def _check_leaf_asynchronous(leaf: Composition) -> None:
    """Raises IncompatiblePartsError if a composition's messages cannot be made and decoded by one rank alone."""
    compressor, memory, communicator = leaf.compressor, leaf.memory, leaf.communicator
    own = type(memory).exchange is Memory.exchange and type(memory).on_aggregate is Memory.on_aggregate
    if compressor.shared_state or not own:
        raise IncompatiblePartsError(
            f"{memory if not own else compressor} needs data of all ranks at one step, but asynchronous ranks have no common step; "
            "use topk, qsgd, efsignsgd or another compressor without such a state, and memory 'residual'"
        )
    if type(compressor).exchange is not Compressor.exchange or communicator.name not in ("allreduce", "allgather", "broadcast"):
        part = compressor if type(compressor).exchange is not Compressor.exchange else communicator
        raise IncompatiblePartsError(
            f"asynchronous ranks send each other whole messages, but {part.name!r} needs all ranks at once; use a compressor without "
            "rounds of its own, and communicator 'allgather'"
        )


class _Gathered(Grace):
    """Sends every tensor as the route says, but by 'allgather', whose messages any rank can decode by itself."""

    def parts_of(self, leaf: Composition, spec: TensorSpec) -> Parts:
        compressor, memory, _ = super().parts_of(leaf, spec)
        return compressor, memory, communicators.get("allgather").create()


def with_allgather(g: Grace) -> Grace:
    """Returns the same compressors and memories with communicator 'allgather'."""
    if isinstance(g.route, Composition):
        return Grace(dataclasses.replace(g.route, communicator=communicators.get("allgather").create()), g.seed)
    return _Gathered(g.route, g.seed)
