"""What a communicator is: which collective carries a payload, and how the ranks' payloads become one result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import IncompatiblePartsError
from ..parts import Part
from ..spec import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..compressors.base import Compressor, Payload
    from ..ops import Array, Ops


@dataclass(frozen=True)
class Communicator(Part):
    """A generator that yields requests (see exchange.py) and never blocks."""

    kind: ClassVar[str] = "communicator"

    @abstractmethod
    def exchange(
        self, ops: Ops, compressor: Compressor, payload: Payload, spec: TensorSpec, info: StepInfo
    ) -> Generator[Any, Any, Array]:
        """Yields one request for this tensor's payload, is resumed with its result, returns the aggregate."""

    def check(self, compressor: Compressor) -> None:
        """Raises IncompatiblePartsError where this communicator cannot carry that compressor's payloads."""
        if compressor.own_rounds:
            raise IncompatiblePartsError(
                f"{compressor.name!r} communicates in rounds of all-reduces of its own, which {self.name!r} would drop; "
                "use communicator 'allreduce'"
            )
