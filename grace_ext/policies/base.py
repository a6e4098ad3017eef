"""A policy chooses the composition that a tensor goes through at each step. Subclass `Policy` as a frozen dataclass and register it."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..composition.composition import Composition, Query, Route
from ..composition.making import route_from
from ..errors import IncompatiblePartsError
from ..parts.part import Part, made_knob
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from ..exchange.effects import Effects
    from ..exchange.transport import Transport
    from ..parts.ops import Array, Ops


@dataclass(frozen=True)
class Policy(Part, Route):
    """Chooses a composition for each tensor at the start of each step: from the tensor's name and shape, the number of the step, and what
    the policy has learnt of aggregates, or of what all ranks reported. All ranks know these alike, so all ranks choose alike.

    A subclass needs `choose`, `leaves` and, if tensors may go through the routes in its knobs, `branches`.
    A policy owns no state: one that learns is given its state of a tensor, as every part is, and changes are committed with the step.
    """

    kind: ClassVar[str] = "policy"
    #: Whether its own choice for a tensor may differ from step to step.
    varies: ClassVar[bool] = False
    #: Whether it keeps state of its own, from gradients that all ranks know alike.
    learns: ClassVar[bool] = False
    #: Whether it decides by measured times, so that two runs of the same steps may choose differently.
    timed: ClassVar[bool] = False
    #: Whether it decides for all its tensors at once (`settle`), so that one driver must hold them.
    whole_model: ClassVar[bool] = False
    #: Whether it decides for the tensors only that will go through it (`open_branches`); the others begin anew, as `init` says.
    only_in_use: ClassVar[bool] = False

    @abstractmethod
    def choose(self, query: Query) -> Composition:
        """Returns the composition that the tensor goes through. Pure."""

    @property
    @abstractmethod
    def leaves(self) -> tuple[Composition, ...]:
        """Every composition that some tensor may go through at some step."""

    def branches(self, spec: TensorSpec) -> Mapping[str, Route]:
        """Returns, by knob, the compositions and policies in its knobs that such a tensor may go through."""
        return {}

    def open_branches(self, query: Query) -> Mapping[str, Route]:
        """Returns those of `branches` that the tensor may go through until this policy learns something new, whatever the step."""
        return self.branches(query.spec)

    def variants(self, spec: TensorSpec) -> Sequence[Composition]:
        """Returns the compositions that the policy makes itself for such a tensor."""
        return ()

    @property
    def changes(self) -> bool:
        """Whether this policy, or one in its knobs, may choose another composition for a tensor at another step."""
        return self.varies or any(child.changes for child in self.children())

    def children(self) -> list[Any]:
        """Returns the compositions and policies in its knobs."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [value for value in values if isinstance(value, Route)]

    def reached(self, spec: TensorSpec, path: str) -> Iterator[tuple[str, Route]]:
        yield path, self
        for knob, child in self.branches(spec).items():
            yield from child.reached(spec, f"{path}.{knob}")
        for leaf in self.variants(spec):
            yield path, leaf

    def notices(self, specs: Sequence[TensorSpec]) -> list[str]:
        """Returns sentences for the user's log, once the parameters that the policy decides about are known."""
        return []

    def check_drifts(self) -> None:
        """Raises IncompatiblePartsError if it cannot decide about how far models have moved, which LocalSGD sends in place of gradients. A
        step is a synchronization then."""
        if self.timed:
            raise IncompatiblePartsError(
                f"policy {self.name!r} goes by the times of steps that exchange gradients during the backward pass, but LocalSGD exchanges "
                "after some steps, with nothing beside it; name a spec, or use by_name, by_size, warmup, ratio_warmup, every, accordion or "
                "lgreco"
            )

    # --- for a policy that learns -------------------------------------------------------------------------------------
    def init(self, ops: Ops, spec: TensorSpec) -> dict[str, Array]:
        """Returns its state of a tensor before the first step, by keys of its own. What `choose` reads is always equal on all ranks."""
        return {}

    def inspect(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> dict[str, Array]:
        """Returns what changes in its state by this rank's own gradient, float[d], before it is compressed; for `report`. The gradient must
        not be kept or changed."""
        return {}

    def inspects_compensated(self, step: int) -> bool:
        """Whether `inspect` is given at this step what the tensor's memory makes of the gradient, which is what will be compressed."""
        return False

    def check_two_level(self) -> None:
        """Raises IncompatiblePartsError if it cannot decide where gradients are summed inside nodes before they are compressed."""

    def observe(self, ops: Ops, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State) -> dict[str, Array]:
        """Returns what changes in its state by the result of a step, float[d], the same on all ranks. It must not be kept or changed."""
        return {}

    def due(self, query: Query) -> bool:
        """Whether the ranks' reports are gathered and settled at the end of this step, if all gradients are finite. Asked about the first
        of its tensors, with the state at the start of the step."""
        return False

    def survey(self, transport: Transport, specs: Sequence[TensorSpec], compute: float, prefix: str) -> Effects:
        """Measures what `settle` needs and returns it as `found`: a generator of Start and Wait, run on every rank before `report`. The
        names of its collectives begin with `prefix`. compute: seconds that this rank spent between the last exchange and this one."""
        return None
        yield

    def report(self, ops: Ops, states: Mapping[TensorSpec, State], found: Any) -> np.ndarray:
        """Returns what this rank measured of all its tensors, and `found` in the survey: float32, of a length that all ranks share. Called
        if `due`."""
        raise NotImplementedError(f"{type(self).__name__} is due for reports, so it must define report()")

    def settle(
        self, ops: Ops, reports: Sequence[np.ndarray], states: Mapping[TensorSpec, State], found: Any
    ) -> tuple[list[dict[str, Array]], list[str]]:
        """Decides by the reports of all ranks. Returns what changes in the tensors' states, in their order, and sentences for the user's
        log, which may use what this rank `found`. The changes must be the same bits on every rank, so they must not depend on sums whose
        order a library chooses, such as products of matrices."""
        raise NotImplementedError(f"{type(self).__name__} is due for reports, so it must define settle()")


def route_knob(default: str, help: str) -> Any:
    """Declares a field that holds a composition or a policy, given as a spec, a configuration or an instance."""
    return made_knob(default, help, "a spec", route_from)


def composition_knob(default: str, help: str) -> Any:
    """Declares a field that holds a composition, not a policy."""
    return made_knob(default, help, "a spec without a policy", _composition)


def _composition(value: Any) -> Composition:
    route = route_from(value)
    if not isinstance(route, Composition):
        raise ValueError
    return route
