"""What a policy is: it says which composition a tensor goes through at a step. Subclass it as a frozen dataclass, register it by name."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..parts.part import Part, made_knob
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from ..composition import Composition
    from ..driver import Effects
    from ..exchange.transport import Transport
    from ..parts.ops import Array, Ops


class Asked(NamedTuple):
    """A question to a policy: what does this tensor go through at this step? `state` is all of the tensor's state at the start of the step,
    `path` the place of the policy among those around it: 'policy', 'policy.large', ..."""

    spec: TensorSpec
    step: int
    state: State
    path: str = "policy"

    def under(self, knob: str) -> Asked:
        """The same question to the policy in this knob."""
        return self._replace(path=f"{self.path}.{knob}")

    def own(self, key: str) -> Array | None:
        """The value of one of the policy's own keys; None before the first step."""
        return self.state.get(f"{self.path}:{key}")


@dataclass(frozen=True)
class Policy(Part):
    """Chooses a composition for each tensor at the start of each step, from the tensor's name and shape, the number of the step, and what
    the policy has learnt of aggregates or of what all ranks reported, which all know alike. So all ranks choose alike.

    It owns no state: a learning one is given that of a tensor, as every part is, and what changes is committed with the step.
    """

    kind: ClassVar[str] = "policy"
    #: Its own choice for a tensor may be another one at another step.
    varies: ClassVar[bool] = False
    #: It keeps state of its own, from gradients that all ranks know alike.
    learns: ClassVar[bool] = False
    #: It decides for all its tensors at once (`settle`), so one driver must hold them.
    whole_model: ClassVar[bool] = False

    @abstractmethod
    def choose(self, asked: Asked) -> Composition:
        """What the tensor goes through. Pure."""

    def branches(self, spec: TensorSpec) -> Mapping[str, Any]:
        """By knob: the compositions and policies that such a tensor may go through as they are."""
        return {}

    def variants(self, spec: TensorSpec) -> Sequence[Composition]:
        """The compositions that it makes itself, for such a tensor."""
        return ()

    @property
    @abstractmethod
    def leaves(self) -> tuple[Composition, ...]:
        """Every composition that some tensor may go through at some step."""

    @property
    def changes(self) -> bool:
        """What it or a policy in it chooses for a tensor may be another composition at another step."""
        return self.varies or any(child.changes for child in self.children())

    def children(self) -> list[Any]:
        """The compositions and policies in its knobs."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [value for value in values if hasattr(value, "leaves")]

    def reached(self, spec: TensorSpec, path: str) -> Iterator[tuple[str, Any]]:
        """The policies that have a say about such a tensor, this one first, and the compositions that it may go through, with their
        places."""
        yield path, self
        for knob, child in self.branches(spec).items():
            yield from child.reached(spec, f"{path}.{knob}")
        for leaf in self.variants(spec):
            yield path, leaf

    def told(self, specs: Sequence[TensorSpec]) -> list[str]:
        """What the user should know once the parameters are known, in sentences."""
        return []

    # --- what a learning policy does -----------------------------------------------------------------------------------
    def init(self, ops: Ops, spec: TensorSpec) -> dict[str, Array]:
        """What it keeps of a tensor before the first step, by keys of its own. What `choose` looks at is equal on all ranks at any time."""
        return {}

    def measure(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> dict[str, Array]:
        """What changes of it by this rank's own gradient, float[d], before it is compressed: not to be kept or changed. For `report`."""
        return {}

    def observe(self, ops: Ops, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State) -> dict[str, Array]:
        """What changes of it by the result of a step: float[d], the same on all ranks, not to be kept or changed."""
        return {}

    def due(self, asked: Asked) -> bool:
        """Whether the ranks' reports are to be gathered at the end of this step, and to be settled, where it was finite everywhere. Asked
        about the first of its tensors, with the state at the start of the step."""
        return False

    def survey(self, transport: Transport, specs: Sequence[TensorSpec], compute: float, prefix: str) -> Effects:
        """What is to be known for `settle`, and nobody has measured: called on all ranks before it, a generator of the driver's effects,
        whose names begin with `prefix`. `compute`: seconds that this rank spent between the last exchange and this one."""
        return None
        yield

    def report(self, ops: Ops, states: Mapping[TensorSpec, State], found: Any) -> np.ndarray:
        """float32, of a length that all ranks share: what this rank has measured of all its tensors, or `found` by `survey`. Asked for
        where `due`."""
        raise NotImplementedError

    def settle(
        self, ops: Ops, reports: Sequence[np.ndarray], states: Mapping[TensorSpec, State], found: Any
    ) -> tuple[list[dict[str, Array]], list[str]]:
        """What changes of the tensors' states, in their order, given the reports of all ranks, and sentences for the user, for which there
        is what this rank `found`. The changes are the same on every rank, so no product of matrices or other sum of a library's own
        order may be in them."""
        raise NotImplementedError


def plan_knob(default: str, help: str) -> Any:
    """A field that holds a composition or a policy, given as a spec, a configuration or an instance."""
    return made_knob(default, help, "a spec", _plan)


def composition_knob(default: str, help: str) -> Any:
    """A field that holds a composition, not a policy."""
    return made_knob(default, help, "a spec without a policy", _composition)


def _plan(value: Any) -> Any:
    from ..composition import plan_from

    return plan_from(value)


def _composition(value: Any) -> Any:
    made = _plan(value)
    if isinstance(made, Policy):
        raise ValueError
    return made
