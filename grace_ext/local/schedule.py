"""Schedules: after which local steps a rank synchronizes its model."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParameterError, shown

At = Callable[[int], Any]


@dataclass(frozen=True)
class Schedule:
    """Says after which local steps, counted from 1, a rank synchronizes.

    gap: the most steps from one synchronization to the next (H in the papers), whatever `at` says.
    at: also synchronizes after step t if at(t) is true; None: by the gap only.
    start: during the first `start` steps gradients are averaged at every step and models are not synchronized (post-local SGD); the gap
      counts from there.
    text: describes `at`; synchronous ranks compare it, so that no rank waits for one that has another schedule.
    """

    gap: int
    at: At | None = None
    start: int = 0
    text: str = ""

    def due(self, step: int, last: int) -> bool:
        """Whether to synchronize after local step `step`, if the last synchronization was after step `last`."""
        if step <= self.start:
            return False
        return step - max(last, self.start) >= self.gap or (self.at is not None and bool(self.at(step)))

    def __str__(self) -> str:
        after = f", gradients averaged until step {self.start}" if self.start else ""
        return (self.text or f"every {self.gap} steps") + after


def post_local(start: int, every: int = 8) -> Schedule:
    """Returns the schedule of post-local SGD: gradients are averaged, dense, at each of the first `start` steps; then models are
    synchronized after every `every` local steps. Source: Lin et al. 2020 (Don't Use Large Mini-Batches, Use Local SGD)."""
    return Schedule(whole("every", every, 1), start=whole("start", start, 0))


def schedule_of(every: int | None, schedule: Any, max_gap: int | None) -> Schedule:
    """Returns the Schedule for a user's options: `every`, or `schedule` as a Schedule, an increasing sequence of steps, or a function of
    the step, for which `max_gap` bounds the gap. Raises ParameterError."""
    if every is not None and schedule is not None:
        raise ParameterError("every= and schedule= exclude each other; give one, not both")
    if max_gap is not None and (schedule is None or isinstance(schedule, Schedule)):
        raise ParameterError("max_gap= is for a schedule that is a sequence or a function; every= and a Schedule have their own gap")
    if isinstance(schedule, Schedule):
        return schedule
    if schedule is None:
        return Schedule(whole("every", 8 if every is None else every, 1))
    if callable(schedule):
        if max_gap is None:
            raise ParameterError("schedule= is a function, and nothing bounds the steps between two synchronizations: also give max_gap=")
        return Schedule(whole("max_gap", max_gap, 1), schedule, text=f"by a function, at least every {max_gap} steps")
    return _of_sequence(schedule, max_gap)


def _of_sequence(steps: Sequence[int], max_gap: int | None) -> Schedule:
    """Returns the schedule of a sequence of steps; after its last step it goes on with its largest gap."""
    try:
        chosen = [whole("a step of the schedule", step, 1) for step in steps]
    except TypeError:
        raise ParameterError(
            f"schedule= must be a sequence of steps, a function of the step, or post_local(...), got {shown(steps)}"
        ) from None
    if not chosen or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ParameterError(f"a schedule of steps must increase and have at least one step, got {shown(chosen[:8])}")
    largest = max(b - a for a, b in itertools.pairwise([0, *chosen]))
    if max_gap is not None and largest > whole("max_gap", max_gap, 1):
        raise ParameterError(f"the schedule has a gap of {largest} steps, max_gap is {max_gap}; give more steps or a larger max_gap")
    digest = hashlib.blake2b(json.dumps(chosen).encode(), digest_size=4).hexdigest()
    return Schedule(largest, frozenset(chosen).__contains__, text=f"at {len(chosen)} steps listed ({digest})")


def whole(what: str, value: Any, low: int) -> int:
    """Returns the value. Raises ParameterError unless it is a whole number, at least `low`, of at most 64 bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value.__index__() < 1 << 63:
        raise ParameterError(f"{what} must be a whole number, at least {low} and below 2**63, got {shown(value)}")
    return value.__index__()
