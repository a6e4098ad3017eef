"""When a rank synchronizes its model."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParameterError

At = Callable[[int], Any]


@dataclass(frozen=True)
class Schedule:
    """The local steps, counted from 1, after which a rank synchronizes.

    gap: at the latest this many steps after the last synchronization (H in the papers), whatever `at` says.
    at: also after step t where at(t) is true; None: only by the gap.
    start: before this many steps nothing is synchronized, but the gradients of every step are averaged (post-local SGD); the gap counts
      from there.
    text: what ranks of a synchronous training compare, so that they do not wait for one that has another schedule.
    """

    gap: int
    at: At | None = None
    start: int = 0
    text: str = ""

    def due(self, step: int, last: int) -> bool:
        """Whether to synchronize after local step `step`, the last time having been after step `last`."""
        if step <= self.start:
            return False
        return step - max(last, self.start) >= self.gap or (self.at is not None and bool(self.at(step)))

    def __str__(self) -> str:
        after = f", gradients averaged until step {self.start}" if self.start else ""
        return (self.text or f"every {self.gap} steps") + after


def post_local(start: int, every: int = 8) -> Schedule:
    """Post-local SGD: dense averages of the gradients at each of the first `start` steps, then local steps and a synchronization after
    every `every` of them. Source: Lin et al. 2020 (Don't Use Large Mini-Batches, Use Local SGD)."""
    return Schedule(whole("every", every, 1), start=whole("start", start, 0))


def schedule_of(every: int | None, schedule: Any, max_gap: int | None) -> Schedule:
    """From what a user gives: `every`, or `schedule` as a Schedule, an increasing sequence of steps, or a function of the step, whose gap
    `max_gap` bounds. Raises ParameterError."""
    if every is not None and schedule is not None:
        raise ParameterError("give every=, or schedule=, not both")
    if max_gap is not None and (schedule is None or isinstance(schedule, Schedule)):
        raise ParameterError("max_gap= is for a schedule that is a sequence or a function; every=, and a Schedule, say their gap")
    if isinstance(schedule, Schedule):
        return schedule
    if schedule is None:
        return Schedule(whole("every", 8 if every is None else every, 1))
    if callable(schedule):
        if max_gap is None:
            raise ParameterError("schedule= is a function, and nothing bounds the steps between two synchronizations: give max_gap=, too")
        return Schedule(whole("max_gap", max_gap, 1), schedule, text=f"by a function, at least every {max_gap} steps")
    return _of_sequence(schedule, max_gap)


def _of_sequence(steps: Sequence[int], max_gap: int | None) -> Schedule:
    """The largest gap of the sequence is the bound; where the sequence ends it goes on with that."""
    try:
        chosen = [whole("a step of the schedule", step, 1) for step in steps]
    except TypeError:
        raise ParameterError(f"schedule= is a sequence of steps, a function of the step, or post_local(...), got {steps!r}") from None
    if not chosen or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ParameterError(f"a schedule of steps must increase and have at least one, got {chosen[:8]}")
    largest = max(b - a for a, b in itertools.pairwise([0, *chosen]))
    if max_gap is not None and largest > whole("max_gap", max_gap, 1):
        raise ParameterError(f"the schedule has a gap of {largest} steps, max_gap is {max_gap}")
    digest = hashlib.blake2b(json.dumps(chosen).encode(), digest_size=4).hexdigest()
    return Schedule(largest, frozenset(chosen).__contains__, text=f"at {len(chosen)} steps listed ({digest})")


def whole(what: str, value: Any, low: int) -> int:
    """The value, checked to be a whole number, at least `low`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < low:
        raise ParameterError(f"{what} must be a whole number, at least {low}, got {value!r}")
    return value.__index__()
