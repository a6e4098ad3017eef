"""A composition is three parts that work together. A route says which composition a tensor goes through at a step: a composition is always
itself, a policy chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..communicators.base import Communicator
from ..compressors.base import Compressor
from ..errors import IncompatiblePartsError
from ..memories.base import Memory
from ..parts.ops import Array
from ..parts.registry import communicators, compressors
from ..parts.state import State
from ..parts.tensor import TensorSpec

Parts = tuple[Compressor, Memory, Communicator]


def uncompressed(parts: Parts) -> Parts:
    """Returns these parts without compression, for ranks that need not send anything. Votes and signs stay what they are."""
    compressor, memory, _ = parts
    return parts if compressor.result != "mean" else (compressors.get("none").create(), memory, communicators.get("allreduce").create())


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


@dataclass(frozen=True)
class Composition(Route):
    """A compressor, a memory and a communicator that one tensor goes through at one step. Immutable, compared by value. `compose` makes one
    and checks that the parts fit."""

    compressor: Compressor
    memory: Memory
    communicator: Communicator

    def check(self) -> None:
        """Raises IncompatiblePartsError if the parts cannot work together."""
        self.compressor.check()
        self.communicator.check(self.compressor)
        self.memory.check(self.compressor)
        self.communicator.check_memory(self.memory)

    @cached_property
    def dense(self) -> Composition:
        """The same without compression: the memory goes on, and what it held back is sent."""
        none = compressors.get("none").create()
        try:
            self.communicator.check(none)
        except IncompatiblePartsError:  # it carries compressed payloads only
            return Composition(none, self.memory, communicators.get("allreduce").create())
        return Composition(none, self.memory, self.communicator)

    @cached_property
    def dense_step(self) -> Composition:
        """`dense` for a step at which every tensor is sent so: by all-reduce if a gather would bring every rank n - 1 whole gradients. (A
        few small tensors are better off in the gather that their neighbours are in.)"""
        gathered, reduce = self.dense, communicators.get("allreduce").create()
        if gathered.communicator.two_level or gathered.communicator.bytes_sent(8, 1, 1) <= reduce.bytes_sent(8, 1, 1):
            return gathered
        return Composition(gathered.compressor, self.memory, reduce)

    def parts_for(self, spec: TensorSpec) -> Parts:
        """Returns the parts that a tensor of this shape really goes through: dense if its payload would not be smaller."""
        chosen = self.dense if not spec.empty and self.compressor.sends_dense(self.memory.carried(spec)) else self
        return chosen.compressor, self.memory, chosen.communicator

    def nbytes(self, spec: TensorSpec, size: int = 2) -> int:
        """Upper bound of the bytes per step that one of `size` ranks hands to collectives for such a tensor, bucket headers excluded."""
        compressor, memory, communicator = self.parts_for(spec)
        return memory.sends * communicator.input_bytes(compressor, memory.carried(spec), size) if not spec.empty else 0

    def mean_nbytes(self, spec: TensorSpec) -> float:
        """Expected bytes per step of such a tensor's payloads. Votes that are counted by a sum are sent as counters."""
        compressor, memory, _ = self.parts_for(spec)
        if compressor.result == "vote":
            return self.nbytes(spec)
        return memory.sends * compressor.mean_nbytes(memory.carried(spec)) if not spec.empty else 0.0

    def to_config(self) -> dict[str, Any]:
        """Returns a JSON-safe dictionary."""
        return {kind: getattr(self, kind).to_config() for kind in ("compressor", "memory", "communicator")}

    def __str__(self) -> str:
        memory = "" if self.memory.name == "none" else f" + {self.memory}"
        return f"{self.compressor}{memory} @ {self.communicator}"

    # --- as a route ---------------------------------------------------------------------------------------------------
    @property
    def changes(self) -> bool:
        return False

    @property
    def leaves(self) -> tuple[Composition, ...]:
        return (self,)

    def choose(self, query: Query) -> Composition:
        return self

    def reached(self, spec: TensorSpec, path: str) -> Iterator[tuple[str, Route]]:
        yield path, self

    @property
    def plain(self) -> bool:
        """Whether nothing is compressed and nothing remembered."""
        return self.compressor.name == "none" and self.memory.name == "none"
