"""Arrays that a compressor codes on every rank, and whose sum over the ranks it needs in the middle of its exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ...parts.field import Field
from ...parts.ops import Array, Ops
from ...parts.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np


class Coder(Protocol):
    """Is a compressor that exchanges coded arrays in rounds of its own. A communicator's `sum_of_codes` makes such a round."""

    def coded(self, spec: TensorSpec) -> Mapping[str, int]:
        """Returns the number of elements of each array that is coded, by its name."""

    def code_fields(self, name: str, count: int) -> Sequence[Field]:
        """Returns the fields of the payload that codes `count` elements of this array."""

    def encode(self, ops: Ops, x: np.ndarray) -> Sequence[Array]:
        """Returns the payload for float64[count] on the host. What is not finite counts as 0."""

    def decode(self, ops: Ops, payload: Sequence[Any], count: int) -> np.ndarray:
        """Returns float64[count] on the host. Raises PayloadError."""
