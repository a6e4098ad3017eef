"""What a part may ask of the other ranks: it yields a request and is resumed with the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .field import Field
from .ops import Array


class AllReduce(NamedTuple):
    """Mean (or sum, with divisor 1) over the ranks of a flat float array: float32, or float64. With a 16-bit `dtype` the array is its wire
    form, uint8[], and so is the result: summed in float32 in rank order, divided, and rounded once. With an integer dtype ('int8', 'int16',
    'int32') the array is int64[] whose sum over ranks must fit, and the result is the exact sum, int64[], never divided."""

    array: Array
    dtype: str


class Gather(NamedTuple):
    """Every rank's payload: the result is a list of payloads in rank order. `by_rank`: the fields of each rank's payload, where they are
    not the same. `finite`: False where what the payload should stand for was not finite; then no rank commits the step."""

    fields: Sequence[Field]
    payload: Sequence[Array]
    by_broadcast: bool = False
    by_rank: Sequence[Sequence[Field]] | None = None
    finite: bool = True


class Scatter(NamedTuple):
    """A payload for each rank, in rank order, with the fields of each: the result is a list, in rank order, of the payloads that the ranks
    made for this one."""

    fields: Sequence[Sequence[Field]]
    payloads: Sequence[Sequence[Array]]


class Together(NamedTuple):
    """Not a collective: a value of this tensor, for a part that looks at all tensors of the bucket at once. `combine(values)`, a
    module-level function, is called with the values of all tensors that ask with it and returns one answer for each."""

    value: Any
    combine: Callable[[list[Any]], Sequence[Any]]
