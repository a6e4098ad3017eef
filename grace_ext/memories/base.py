"""The base of memories: error feedback, as four methods around the exchange of one tensor. Subclass `Memory` and register it by name."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..compressors.base import Compressor, Exchanged
from ..errors import IncompatiblePartsError
from ..parts.field import HALVES
from ..parts.part import Part
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec
from .fast_path import FastPath

if TYPE_CHECKING:
    from ..parts.ops import Array, Ops

#: Compresses and communicates one flat array: `done = yield from send(p)`.
Send = Callable[["Array"], Generator[Any, Any, Exchanged]]


@dataclass(frozen=True)
class Memory(FastPath, Part):
    """Decides what is added to a gradient before compression and what is kept after it.

    A subclass must define three methods: `init`, `before` and `after`; a fourth, `on_aggregate`, if the result of all ranks changes what it
    keeps or returns. It then declares what is true of it. Everything else has a default.

    A memory owns no state: arrays come in and new ones go out, and the driver commits them only if the step is accepted on every rank.
    It must not return or store a view of the gradient, nor change it.
    """

    # --- what an author must define -----------------------------------------------------------------------------------
    @abstractmethod
    def init(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> State:
        """Returns the state before the first step: flat arrays by key. Parts that use the same key mean the same by it, in the same unit: a
        policy that changes parts hands the array from one to the other."""

    @abstractmethod
    def before(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> Array:
        """Returns what is compressed in place of the gradient: a new array, unless nothing is kept."""

    @abstractmethod
    def after(self, ops: Ops, compensated: Array, sent: Exchanged, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """Returns the new state, given `sent.values()`, what this rank's payload decodes to in the precision that was really sent, and
        `sent.positions()`, where it has values at all (None: everywhere)."""

    def on_aggregate(self, ops: Ops, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, State]:
        """Returns what the user gets for the aggregate of all ranks, and what changes in the state by it."""
        return aggregate, {}

    # --- what an author declares --------------------------------------------------------------------------------------
    kind: ClassVar[str] = "memory"
    #: Whether it is the momentum of the training itself, so that the optimizer must be SGD without momentum of its own.
    is_momentum: ClassVar[bool] = False
    #: The momentum that the optimizer must have, because it is what the memory compresses; None: any.
    optimizer_momentum: ClassVar[float | None] = None
    #: Whether what it compresses is in units of the update (the gradient times the learning rate).
    in_updates: ClassVar[bool] = False
    #: Whether it adds what was not sent to what is sent next: a random compressor whose variance exceeds the signal makes that grow.
    feeds_back: ClassVar[bool] = False
    #: The key of its state under which it keeps what was not sent, if it keeps that.
    unsent_key: ClassVar[str] = "residual"
    #: Whether its state on one rank is of use without the states of the others (a checkpoint of rank 0 alone).
    resumes_alone: ClassVar[bool] = True
    #: Whether the result differs from rank to rank: only for wrappers that average models, and for LocalCluster.
    diverges: ClassVar[bool] = False
    #: How often it sends a tensor in one step, at most.
    sends: ClassVar[int] = 1
    #: Whether it looks at all tensors of the model at once, so that they travel in one bucket.
    whole_model: ClassVar[bool] = False

    def check(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError if this memory cannot work with that compressor."""

    def carried(self, spec: TensorSpec) -> TensorSpec:
        """Returns the tensor as it is sent. If all ranks must know the mean of what they sent, 16-bit gradients travel as float32: an
        all-reduce would round the mean to 16 bits at each step, and these errors would add up."""
        return dataclasses.replace(spec, dtype="float32") if self.mean_state and spec.dtype in HALVES else spec

    # --- the exchange of one tensor -----------------------------------------------------------------------------------
    def absorb(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """Returns what changes in the state by the gradient alone, before anything is sent: a momentum of this rank's own. `before` and
        `after` see it."""
        return {}

    def exchange(
        self, ops: Ops, send: Send, grad: Array, spec: TensorSpec, info: StepInfo, state: State
    ) -> Generator[Any, Any, tuple[Any, ...]]:
        """Makes one step; returns (the user's result, and changes of the state, later ones over earlier ones). Overridden by memories that
        send more than one array, or that ask the other tensors (requests.Together) first."""
        absorbed = self.absorb(ops, grad, spec, info, state)
        state = {**state, **absorbed}
        compensated = self.before(ops, grad, spec, info, state)
        done = yield from send(compensated)
        kept = self.after(ops, compensated, done, spec, info, state)
        output, last = self.on_aggregate(ops, done.aggregate, spec, info, {**state, **kept})
        return output, absorbed, done.state, kept, last

    # --- helpers for subclasses ---------------------------------------------------------------------------------------
    def unsent(self, ops: Ops, compensated: Array, sent: Exchanged) -> Array:
        """float32: what the payload lost of what was compressed, the residual of error feedback. Differences that float32 cannot hold
        become the largest that it can. May be written over `compensated`."""
        if ops.cast(compensated, "float32") is not compensated:
            compensated = ops.cast(compensated - sent.values(), "float32")
        elif sent.remove:
            sent.remove(compensated)  # it is this memory's own
        else:
            compensated -= sent.values()
        return ops.saturated(compensated)

    def needs_magnitudes(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError, for `check`, if the compressor's result is a vote, which has no size."""
        if compressor.result == "vote":
            raise IncompatiblePartsError(
                f"memory {self.name!r} needs a compressor whose result stands for what was compressed, and {compressor.name!r} gives a "
                "vote in {-1, 0, 1}, which has no size; use compressor 'efsignsgd' (signs with a scale), or memory 'residual' or 'none'"
            )

    def needs_contraction(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError, for `check`, if the compressor promises no contraction."""
        self.needs_magnitudes(compressor)
        if compressor.delta(64) is None:
            instead = "memory 'diana' or 'none'" if compressor.unbiased else "memory 'residual'"
            raise IncompatiblePartsError(
                f"memory {self.name!r} needs a contraction, E||C(x) - x||^2 <= (1 - delta) ||x||^2, which {compressor} does not promise; "
                f"use a compressor that does, such as topk, randomk, efsignsgd or 'topk > qsgd', or with {compressor.name!r} {instead}"
            )

    def needs_mean(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError, for `check`, if the result is not the mean of what the ranks' payloads decode to."""
        if not compressor.averages:
            raise IncompatiblePartsError(
                f"memory {self.name!r} keeps the mean of what all ranks have sent, and the result of {compressor} is not that mean; use "
                "a compressor whose payloads are averaged, such as topk, randomk or qsgd, or memory 'residual'"
            )
        if compressor.summable and any(field.dtype in HALVES for field in compressor.fields(TensorSpec("", (64, 64)))):
            raise IncompatiblePartsError(
                f"memory {self.name!r} keeps the mean of what all ranks have sent, and an all-reduce rounds a sum of the 16-bit values of "
                f"{compressor} to 16 bits, at each step once more; use values='fp32'"
            )

    def needs_positions(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError, for `check`, if the compressor does not pick positions."""
        if not compressor.selects:
            raise IncompatiblePartsError(
                f"memory {self.name!r} has to know which elements were sent, and {compressor.name!r} sends something of every element; use "
                "a compressor that picks positions, such as topk, threshold, randomk, dgc, sidco or strom"
            )
