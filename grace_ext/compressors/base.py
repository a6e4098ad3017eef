"""What a compressor is. Subclass it as a frozen dataclass, register it by name, and the contract suite tests it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..parts import Field, Part
from ..spec import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..communicators.base import Communicator
    from ..ops import Array, Ops

State = Mapping[str, "Array"]
# The wire form of one tensor: one uint8 array for each field of `fields(spec)`.
Payload = Sequence["Array"]


class Exchanged(NamedTuple):
    """What the exchange of one tensor gives: the aggregate of all ranks, what this rank's own payload stands for (a function,
    because a memory may not ask), and the compressor's new state."""

    aggregate: Array
    sent: Callable[[], Array]
    state: State


@dataclass(frozen=True)
class Compressor(Part):
    """Turns a flat float array into a packed payload and back.

    A compressor owns no state, touches no network and draws from no global generator: state comes in and goes out, and random
    words come from keys of `info`. It is given finite input only, of at least one element.
    """

    kind: ClassVar[str] = "compressor"
    #: Payloads of several ranks can be added up (they share indices, bases or scales), so an all-reduce may carry them.
    summable: ClassVar[bool] = False
    #: E[decode(encode(x))] = x.
    unbiased: ClassVar[bool] = False
    #: Training without error feedback is expected to suffer: one warning where the memory is 'none'.
    wants_memory: ClassVar[bool] = False
    #: It communicates in rounds of its own (PowerSGD: P, then Q) and needs `allreduce`.
    own_rounds: ClassVar[bool] = False
    #: The same input gives the same payload in every array library, byte for byte.
    deterministic_bytes: ClassVar[bool] = True
    #: The aggregate is not a mean (a vote), so that sending a tensor dense instead would change its meaning.
    always_compresses: ClassVar[bool] = False
    #: float64 gradients reach it as float64; every other compressor works in float32.
    keeps_float64: ClassVar[bool] = False

    @abstractmethod
    def fields(self, spec: TensorSpec) -> tuple[Field, ...]:
        """What the payload of such a tensor consists of. Counts are exact, or upper bounds where a field is variable."""

    @abstractmethod
    def compress(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Payload, State]:
        """The payload of x, and the new state."""

    @abstractmethod
    def decompress(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> Array:
        """The flat float array that the payload stands for: a new one, never a view of the payload. Pure. Raises PayloadError."""

    def init(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> State:
        """The state before the first step. Equal on all ranks where it takes part in what they share."""
        return {}

    def accumulate(self, ops: Ops, total: Array, payload: Payload, spec: TensorSpec, info: StepInfo) -> None:
        """Adds one rank's decoded payload to `total`, in place. Sparse compressors add only what they hold."""
        total += self.decompress(ops, payload, spec, info)

    def aggregate(self, ops: Ops, total: Array, spec: TensorSpec, info: StepInfo) -> Array:
        """From the sum over ranks to the result: the mean (or, with divisor 1, the sum)."""
        return total / info.divisor

    def nbytes(self, spec: TensorSpec) -> int:
        """Upper bound of the payload's bytes on the wire, all rounds together, bucket header excluded."""
        return sum(field.max_bytes for field in self.fields(spec))

    def sends_dense(self, spec: TensorSpec) -> bool:
        """Whether such a tensor is sent as it is instead: where the payload would not be smaller."""
        return not self.always_compresses and self.nbytes(spec) >= spec.nbytes

    def exchange(
        self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State, communicator: Communicator
    ) -> Generator[Any, Any, Exchanged]:
        """Compress, send, receive, aggregate. Overridden where the compressor has rounds of its own."""
        payload, state = self.compress(ops, x, spec, info, state)
        aggregate = yield from communicator.exchange(ops, self, payload, spec, info)
        return Exchanged(aggregate, lambda: self.decompress(ops, payload, spec, info), state)
