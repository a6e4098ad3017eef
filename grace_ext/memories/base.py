"""What a memory is: error feedback, as four hooks around the exchange of one tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..parts import Part
from ..spec import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..ops import Array, Ops

State = Mapping[str, "Array"]


@dataclass(frozen=True)
class Memory(Part):
    """Decides what is added before compression and what is kept after it.

    It owns no state: arrays come in and new ones go out, and the runtime commits them only if the step is accepted on every rank.
    It must not return or store a view of the gradient, nor change it.
    """

    kind: ClassVar[str] = "memory"
    #: `after` looks at what was sent; where it does not, a payload is not decoded for it.
    uses_sent: ClassVar[bool] = True

    @abstractmethod
    def init(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> State:
        """The state before the first step: flat arrays by key; keys are unique among all parts ('residual', 'momentum')."""

    @abstractmethod
    def before(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> Array:
        """What is compressed in place of the gradient."""

    @abstractmethod
    def after(self, ops: Ops, compensated: Array, sent: Array | None, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """The new state, given what this rank's payload stands for in the precision that was really sent."""

    def on_aggregate(self, ops: Ops, mean: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, State]:
        """What the user gets for the aggregate of all ranks, and the state after it."""
        return mean, state
