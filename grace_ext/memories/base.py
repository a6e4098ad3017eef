"""What a memory is: error feedback, as four hooks around the exchange of one tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import IncompatiblePartsError
from ..parts.part import Part
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..compressors.base import Compressor, Exchanged
    from ..parts.ops import Array, Feedback, Ops

#: Compresses and communicates one flat array: `done = yield from send(p)`.
Send = Callable[["Array"], Generator[Any, Any, "Exchanged"]]


@dataclass(frozen=True)
class Memory(Part):
    """Decides what is added before compression and what is kept after it.

    It owns no state: arrays come in and new ones go out, and the runtime commits them only if the step is accepted on every rank.
    It must not return or store a view of the gradient, nor change it.
    """

    kind: ClassVar[str] = "memory"
    #: It is the momentum of the training itself, so the optimizer must be SGD without momentum of its own.
    is_momentum: ClassVar[bool] = False
    #: What it compresses is in units of the update (the gradient times the learning rate).
    in_updates: ClassVar[bool] = False
    #: It adds what was not sent to what is sent next: a random compressor whose variance exceeds the signal makes that grow.
    feeds_back: ClassVar[bool] = False
    #: Its state on one rank is of use without the states of the others (a checkpoint of rank 0 alone).
    resumes_alone: ClassVar[bool] = True
    #: The result differs from rank to rank: only for wrappers that average models, and for LocalCluster.
    diverges: ClassVar[bool] = False
    #: Tensors laid end to end may go through it as one: it has `feedback`, keeps nothing but 'residual', and asks for no more than that.
    elementwise: ClassVar[bool] = False
    #: How often it sends a tensor in one step, at most.
    sends: ClassVar[int] = 1
    #: It looks at all tensors of the model at once, so they travel in one bucket.
    whole_model: ClassVar[bool] = False

    @abstractmethod
    def init(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> State:
        """The state before the first step: flat arrays by key; keys are unique among all parts ('residual', 'momentum')."""

    def absorb(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """What of the state the gradient alone changes, before anything is sent: a momentum of this rank's own. `before` and `after` see
        it."""
        return {}

    @abstractmethod
    def before(self, ops: Ops, grad: Array, spec: TensorSpec, info: StepInfo, state: State) -> Array:
        """What is compressed in place of the gradient: a new array, unless nothing is kept."""

    @abstractmethod
    def after(self, ops: Ops, compensated: Array, sent: Exchanged, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """The new state, given `sent.values()`, what this rank's payload stands for in the precision that was really sent, and
        `sent.positions()`, where it sent values at all (None: everywhere)."""

    def feedback(self, state: State) -> Feedback | None:
        """What is added to `incoming` before compression, where what is kept after it is all that was not sent, under the key 'residual',
        and what `marked` gives, and the result is the aggregate: then memory and compressor may work in one pass (Compressor.fused). None
        where it is not so simple."""
        return None

    def incoming(self, grad: Array, state: State) -> Array:
        """With `feedback`: what stands in the gradient's place, given the state with what `absorb` changed of it."""
        return grad

    def marked(self, ops: Ops, sent: Exchanged, state: State) -> State:
        """With `feedback`, and a payload of one round: what of the state follows from where values were sent."""
        return {}

    def on_aggregate(self, ops: Ops, mean: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, State]:
        """What the user gets for the aggregate of all ranks, and the state after it."""
        return mean, state

    def exchange(
        self, ops: Ops, send: Send, grad: Array, spec: TensorSpec, info: StepInfo, state: State
    ) -> Generator[Any, Any, tuple[Array, Any]]:
        """One step: returns (the user's result, and changes of the state, the later ones over the earlier ones). Overridden by memories
        that send more than one array, or that ask the other tensors (exchange.Together) first."""
        absorbed = self.absorb(ops, grad, spec, info, state)
        state = {**state, **absorbed}
        compensated = self.before(ops, grad, spec, info, state)
        done = yield from send(compensated)
        kept = self.after(ops, compensated, done, spec, info, state)
        output, last = self.on_aggregate(ops, done.aggregate, spec, info, {**state, **kept})
        return output, absorbed, done.state, kept, last

    def check(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError where this memory cannot work with that compressor."""

    def unsent(self, ops: Ops, compensated: Array, sent: Exchanged) -> Array:
        """float32: what the payload does not stand for, the residual of error feedback."""
        if ops.cast(compensated, "float32") is not compensated:
            return ops.cast(compensated - sent.values(), "float32")
        if sent.remove:
            sent.remove(compensated)  # it is this memory's own
        else:
            compensated -= sent.values()
        return compensated

    # --- what `check` may ask for ------------------------------------------------------------------------------------
    def _needs_magnitudes(self, compressor: Compressor) -> None:
        if compressor.votes:
            raise IncompatiblePartsError(
                f"memory {self.name!r} needs a compressor whose result stands for what was compressed, and {compressor.name!r} gives a "
                "vote in {-1, 0, 1}, which has no size; use compressor 'efsignsgd' (signs with a scale), or memory 'residual' or 'none'"
            )

    def _needs_contraction(self, compressor: Compressor) -> None:
        self._needs_magnitudes(compressor)
        if compressor.delta(64) is None:
            instead = "memory 'diana' or 'none'" if compressor.unbiased else "memory 'residual'"
            raise IncompatiblePartsError(
                f"memory {self.name!r} needs a contraction, E||C(x) - x||^2 <= (1 - delta) ||x||^2, which {compressor} does not promise; "
                f"use a compressor that does, such as topk, randomk, efsignsgd or 'topk > qsgd', or with {compressor.name!r} {instead}"
            )

    def _needs_positions(self, compressor: Compressor) -> None:
        if not compressor.selects:
            raise IncompatiblePartsError(
                f"memory {self.name!r} has to know which elements were sent, and {compressor.name!r} sends something of every element; use "
                "a compressor that picks positions, such as topk, threshold, randomk, dgc, sidco or strom"
            )
