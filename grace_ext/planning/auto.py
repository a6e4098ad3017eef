from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..composition.composition import Composition
from ..composition.grace import Grace
from ..composition.making import compose, route_from
from ..errors import IncompatiblePartsError, PayloadError
from ..parts.part import knob, made_knob
from ..policies import register
from ..policies.base import Policy
from .candidates import CANDIDATES, DENSE
from .measure import probed, rows_of
from .plan import advise
from .probe import Probe

#: Bytes of the collectives that are timed: these take few seconds even on slow links.
SIZES = (64, 1 << 16, 1 << 20)


class Specs(tuple):
    """Holds compositions. The configuration is a list of their specs."""

    def to_config(self) -> list[str]:
        return [str(candidate) for candidate in self]

    def __str__(self) -> str:
        return str(self.to_config())


def _specs(value: Any) -> Specs:
    if isinstance(value, (str, Mapping)):
        raise ValueError
    routes = [route_from(spec) for spec in ([text for text in CANDIDATES if text != DENSE] if value is None else value)]
    if not routes or any(not isinstance(route, Composition) for route in routes):
        raise ValueError
    return Specs(dict.fromkeys(routes))


@register("auto")
@dataclass(frozen=True)
class Auto(Policy):
    """Sends the first steps dense, then times the candidates in this job and switches to the fastest, or stays dense.

    At the end of step `steps`, or of the first later one that is finite on all ranks, the ranks together time: collectives of a few sizes
    on the job's own network, every candidate's codecs on gradients of the model's shapes, and real exchanges of dense gradients and of the
    `exchanges` candidates that seem fastest. From these, and from the compute time of the fastest step so far, each candidate's step is
    predicted as `grace-ext plan` does; times are those of the slowest rank, the same on all. The fastest is used for all tensors from the
    next step on, or dense if no candidate is a tenth faster. Rank 0's choice is gathered, so all ranks have the same; rank 0 logs it and
    its reason once, in the log 'grace_ext'. Training pauses once, for some seconds to a minute. Only speed counts: name candidates whose
    accuracy you accept, and whose memories suit your optimizer. If they work in two levels ('@ hierarchical'), so do dense steps.
    State: `choice`, float32[1], the number of the candidate (0: dense), -1 before: a resumed training keeps its choice.
    `candidates`: specs; by default those of `grace-ext plan`. More dense steps let the machine warm up; more exchanges make the choice
    more certain.
    Source: common practice of autotuners.
    """

    varies: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    whole_model: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    candidates: Any = made_knob(None, "specs to choose from, besides dense; None: a few that keep accuracy", "a list of specs", _specs)
    steps: int = knob(3, "number of dense steps before it chooses", low=2, high=1e6)
    exchanges: int = knob(3, "number of candidates whose exchanges are timed, besides dense", low=0, high=100)

    def __post_init__(self):
        super().__post_init__()
        if len({leaf.communicator.two_level for leaf in self.candidates}) > 1:
            raise IncompatiblePartsError(
                f"auto: {self.candidates}: either all candidates are exchanged in two levels, or none; make all of them '@ hierarchical', "
                "or none"
            )

    @cached_property
    def leaves(self):
        levels = bool(self.candidates) and self.candidates[0].communicator.two_level
        return (compose("none", None, "hierarchical" if levels else None), *self.candidates)

    def choose(self, query):
        return self.leaves[self._chosen(query) or 0]

    @staticmethod
    def _chosen(query) -> int | None:
        choice = query.own("choice")
        return None if choice is None or choice[0] < 0 else int(choice[0])

    def variants(self, spec):
        return self.leaves

    def init(self, ops, spec):
        return {"choice": self._choice(ops, -1)}

    @staticmethod
    def _choice(ops, number: int):
        return ops.upload(np.array([number], np.float32))

    def due(self, query):
        # Later if that step was not finite, as the first ones of loss scaling often are not.
        return query.step + 1 >= self.steps and self._chosen(query) is None

    def survey(self, transport, specs, compute, prefix):
        """Returns the advice of plan.advise, the same on all ranks; see Policy.survey. None at world size 1."""
        if transport.size == 1:
            return None
        chosen = {str(leaf): Grace(leaf) for leaf in self.leaves}
        shapes = {spec.name: spec for spec in specs}
        probe = Probe(transport, prefix)
        (compute,) = yield from probe.largest([compute])
        found = yield from probed(probe, chosen, shapes, compute=compute, exchanges=self.exchanges, sizes=SIZES, steps=1)
        return advise(rows_of(found))

    def report(self, ops, states, found):
        return np.array([0 if found is None else self._number(found)], np.float32)

    def _number(self, found) -> int:
        return [str(leaf) for leaf in self.leaves].index(found.spec)

    def settle(self, ops, reports, states, found):
        number = int(reports[0][0]) if 0 <= reports[0][0] < len(self.leaves) else -1
        if number < 0:
            raise PayloadError(f"is choice {reports[0][0]}, but choices are 0 to {len(self.leaves) - 1}", 0)
        told = "auto: one rank alone exchanges nothing, so all stays dense"
        if found is not None:
            told = f"auto: {found.spec} from the next step on; {found.reason}"
        return [{"choice": self._choice(ops, number)} for _ in states], [told]
