"""A route says which composition a tensor goes through at a step: a composition is always itself, a policy chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..parts.state import State
from ..parts.tensor import TensorSpec

if TYPE_CHECKING:
    from ..parts.ops import Array
    from .composition import Composition


class Query(NamedTuple):
    """A question to a route: which composition does this tensor go through at this step?

    state: all of the tensor's state at the start of the step. path: the place of the policy that is query: 'policy', or, within another
    one's knob, 'policy.large' and so on."""

    spec: TensorSpec
    step: int
    state: State
    path: str = "policy"

    def under(self, knob: str) -> Query:
        """Returns the same question for the route in this knob."""
        return self._replace(path=f"{self.path}.{knob}")

    def own(self, key: str) -> Array | None:
        """Returns the value of one of the policy's own keys; None before the first step."""
        return self.state.get(f"{self.path}:{key}")


class Route(ABC):
    """What a composition and a policy have in common."""

    @property
    @abstractmethod
    def changes(self) -> bool:
        """Whether the composition of a tensor may differ from step to step."""

    @property
    @abstractmethod
    def leaves(self) -> tuple[Composition, ...]:
        """Every composition that some tensor may go through at some step."""

    @abstractmethod
    def choose(self, query: Query) -> Composition:
        """Returns the composition that the tensor goes through. Pure."""

    @abstractmethod
    def reached(self, spec: TensorSpec, path: str) -> Iterator[tuple[str, Route]]:
        """Yields, with their places, the policies that decide about such a tensor, this one first, and the compositions that it may go
        through."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Returns a JSON-safe dictionary."""
