"""The effects that a driver's generators yield: what they ask of the network, which they never touch themselves."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..parts.field import HALVES, ITEMSIZE
from ..parts.ops import Array

if TYPE_CHECKING:
    from ..parts.tensor import TensorSpec


class Collective(NamedTuple):
    """A collective is one operation on one array of every rank. kind:

    'allreduce'   sums the ranks' arrays, as requests.AllReduce says, and divides by `divisor`
    'allgather'   uint8; the result is a list of the ranks' arrays, by rank. `sizes`: their lengths, or None if they are not known, and
                  then the arrays are messages (message.py), whose headers say how long they are
    'broadcast'   the same result as 'allgather', by n broadcasts
    'alltoall'    uint8; `sizes`: the lengths of the pieces for each rank; the result is a list of pieces, by rank. `received`: the lengths
                  of what arrives, by rank, if not every rank sends as much as this rank's own entry of `sizes`; () if they are not known,
                  and then the pieces are messages

    `limits`: by rank, the most bytes that it can rightly send to this one, if sizes are not known.
    `label`: tells the collectives of a bucket's round apart.
    `group`: the ranks that take part. 'all'; 'inside': those of this rank's node; 'between': the first rank of every node; 'idle': this
      rank takes no part, and its result is None (hierarchy.py). 'rows': those that hold the rows of the same matrices (TensorSpec.rows).
    """

    kind: str
    array: Array
    label: str
    divisor: int = 1
    sizes: tuple[int, ...] | None = None
    dtype: str = "uint8"
    received: tuple[int, ...] | None = None
    group: str = "all"
    limits: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this rank hands in; 0 for 'rows', which stay inside a replica and are not what replicas exchange."""
        return 0 if self.group == "rows" else len(self.array) * (1 if self.dtype in HALVES else ITEMSIZE[self.dtype])


class Start(NamedTuple):
    """Starts a collective under a name. `parameters`: the tensors whose gradients it carries, for error messages."""

    name: str
    collective: Collective
    parameters: Sequence[TensorSpec] = ()


class Wait(NamedTuple):
    """Waits for the collective that was started under this name; the generator is resumed with its result."""

    name: str
    parameters: Sequence[TensorSpec] = ()


class Split(NamedTuple):
    """Makes the groups of an exchange in two levels, on all ranks alike. `groups`: the ranks of each node; the last group holds the first
    rank of every node."""

    groups: list[list[int]]


#: A generator of Start, Wait and Split.
Effects = Generator[Any, Any, Any]
