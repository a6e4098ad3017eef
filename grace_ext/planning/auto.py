from __future__ import annotations

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

#: Bytes of the collectives that are timed: few seconds even on slow links.
SIZES = (64, 1 << 16, 1 << 20)


class Specs(tuple):
    """Compositions. Their configuration is a list of their specs."""

    def to_config(self) -> list[str]:
        return [str(candidate) for candidate in self]

    def __str__(self) -> str:
        return str(self.to_config())


def _specs(value: Any) -> Specs:
    if isinstance(value, str):
        raise ValueError
    routes = [route_from(spec) for spec in (value or [text for text in CANDIDATES if text != DENSE])]
    if any(not isinstance(route, Composition) for route in routes):
        raise ValueError
    return Specs(dict.fromkeys(routes))


@register("auto")
@dataclass(frozen=True)
class Auto(Policy):
    """Sends the first steps dense, measures meanwhile, and then takes the candidate whose steps are the shortest, or stays dense.

    At the end of step `steps`, or of the first one after it that is finite everywhere, the ranks time, together: collectives of a few sizes
    on the training's own network, every candidate's codecs on gradients of the model's shapes, and real exchanges of dense and of the
    `exchanges` candidates that seem fastest. From these, and from how long the fastest of the steps before took to compute, each
    candidate's step is predicted as `grace-ext plan` does; times are those of the slowest rank, the same on all. The fastest is taken for
    all tensors from the next step on; dense, where none gains a tenth. Rank 0's choice is gathered, so all ranks hold it; it and its reason
    are told once, in the log 'grace_ext' of rank 0. The pause is some seconds to a minute, once. Speed alone is looked at: name candidates
    whose accuracy you accept, and whose memories go with your optimizer. Where they go in two levels ('@ hierarchical'), dense does, too.
    State: `choice`, float32[1], the number of the candidate (0: dense), -1 before: a training that is resumed keeps its choice.
    `candidates`: specs; none named: those of `grace-ext plan`. More dense steps wait for a warm machine; more exchanges for a surer choice.
    Source: common practice of autotuners.
    """

    varies: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    whole_model: ClassVar[bool] = True
    candidates: Any = made_knob(None, "specs to choose from, beside dense; None: a few that keep accuracy", "a list of specs", _specs)
    steps: int = knob(3, "dense steps at the end of which it chooses", low=2, high=1e6)
    exchanges: int = knob(3, "candidates that are really exchanged, beside dense", low=0, high=100)

    def __post_init__(self):
        super().__post_init__()
        if len({leaf.communicator.two_level for leaf in self.candidates}) > 1:
            raise IncompatiblePartsError(
                f"auto: {self.candidates}: a training goes in two levels with all it sends, or with nothing; make all of them "
                "'@ hierarchical', or none"
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
        # Later where that step was not finite, as the first ones of loss scaling often are.
        return query.step + 1 >= self.steps and self._chosen(query) is None

    def survey(self, transport, specs, compute, prefix):
        """See Policy.survey: what plan.advise says, on all ranks alike."""
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
            raise PayloadError(f"is a choice of {reports[0][0]}, there are {len(self.leaves)}", 0)
        told = "auto: one rank alone exchanges nothing, and stays dense"
        if found is not None:
            told = f"auto: {found.spec} from the next step on; {found.reason}"
        return [{"choice": self._choice(ops, number)} for _ in states], [told]
