"""Requests are what a part may ask of the other ranks: it yields one and is resumed with the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .field import Field
from .ops import Array


class AllReduce(NamedTuple):
    """Asks for the mean (or sum, with divisor 1) over the ranks of a flat float array, float32 or float64. With a 16-bit `dtype`, the array
    is in its wire form, uint8[], and so is the result: summed in float32 in rank order, divided, and rounded once. With an integer dtype
    ('int8', 'int16', 'int32'), the array is int64[] whose sum over the ranks must fit, and the result is the exact sum, int64[], never
    divided."""

    array: Array
    dtype: str


class RowSum(NamedTuple):
    """Asks for the sum of a flat float32 array over the ranks that hold the rows of this tensor's matrix (TensorSpec.rows), this one among
    them; never divided. Ranks of other replicas take no part."""

    array: Array


class Gather(NamedTuple):
    """Asks for every rank's payload: the result is a list of payloads in rank order. `by_rank`: the fields of the payloads, by rank and in
    rank order, if they differ; ranks that it lacks send none, and the result has none of theirs. `finite`: False if what the payload should
    represent was not finite; then no rank commits the step."""

    fields: Sequence[Field]
    payload: Sequence[Array]
    by_broadcast: bool = False
    by_rank: Mapping[int, Sequence[Field]] | None = None
    finite: bool = True


class Scatter(NamedTuple):
    """Sends a payload to some ranks, which are the same on every rank. Payloads and their fields are given by rank. The result is a list,
    in rank order, of the payloads that all ranks made for this one; it is empty if this is not one of those ranks."""

    fields: Mapping[int, Sequence[Field]]
    payloads: Mapping[int, Sequence[Array]]


class Together(NamedTuple):
    """Combines a value of this tensor with those of the bucket's other tensors, for a part that looks at all of them at once; it is not a
    collective. `combine(values)`, a module-level function, is called with the values of all tensors that name it, and returns one answer
    for each."""

    value: Any
    combine: Callable[[list[Any]], Sequence[Any]]
