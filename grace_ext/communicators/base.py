"""What a communicator is: which collective carries a payload, and how the ranks' payloads become one result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..compressors.base import Exchanged
from ..errors import IncompatiblePartsError
from ..parts.part import Part
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..compressors.base import Compressor, Payload, State
    from ..memories.base import Memory
    from ..parts.ops import Array, Ops, Zeros


@dataclass(frozen=True)
class Communicator(Part):
    """A generator that yields requests (see exchange.py) and never blocks."""

    kind: ClassVar[str] = "communicator"
    #: It sends one payload a tensor, as the compressor made it, and `send` takes that.
    carries_payloads: ClassVar[bool] = False
    #: It exchanges inside the nodes first, and only then, by `inner`, between them (levels.py).
    two_level: ClassVar[bool] = False

    def inner(self, compressor: Compressor) -> Communicator:
        """What carries this compressor's payloads in the end: itself, but where it works in two levels."""
        return self

    def keeps_state(self, compressor: Compressor) -> bool:
        """Whether it has a state of its own (see `init`)."""
        return False

    @abstractmethod
    def exchange(
        self, ops: Ops, compressor: Compressor, x: Array, spec: TensorSpec, info: StepInfo, state: State
    ) -> Generator[Any, Any, Exchanged]:
        """Compresses x, yields requests, is resumed with their results, and aggregates."""

    def send(
        self, ops: Ops, compressor: Compressor, payload: Payload, spec: TensorSpec, info: StepInfo, state: State,
        out: Array | Zeros | None = None,
    ) -> Generator[Any, Any, Exchanged]:  # fmt: skip
        """The exchange of what was compressed already, where `carries_payloads`. The aggregate may be written to `out`."""
        raise NotImplementedError

    def init(self, ops: Ops, compressor: Compressor, spec: TensorSpec, info: StepInfo) -> State:
        """The communicator's own state before the first step, where it has one."""
        return {}

    def check_memory(self, memory: Memory) -> None:
        """Raises IncompatiblePartsError where this communicator cannot work under that memory."""

    def input_bytes(self, compressor: Compressor, spec: TensorSpec, n: int) -> int:
        """Upper bound of the bytes that one of n ranks hands to collectives for such a tensor, headers excluded."""
        return compressor.nbytes(spec)

    @abstractmethod
    def bytes_sent(self, n: int, payload: int, dense: int) -> float:
        """Bytes that one of n ranks sends to the network, for payloads of `payload` bytes of tensors of `dense` bytes."""

    def check(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError where this communicator cannot carry that compressor's payloads."""
        if compressor.rounds and self.name not in compressor.rounds:
            raise IncompatiblePartsError(
                f"{compressor.name!r} communicates in rounds of its own, which {self.name!r} would drop; "
                f"use communicator {' or '.join(map(repr, compressor.rounds))}"
            )


def exchanged(
    ops: Ops, compressor: Compressor, payload: Payload, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State
) -> Exchanged:
    """The outcome where one payload was sent."""
    return Exchanged(
        aggregate,
        lambda: compressor.decompress(ops, payload, spec, info),
        state,
        lambda: compressor.positions(ops, payload, spec, info),
        remove=lambda x: compressor.remove(ops, x, payload, spec, info),
    )
