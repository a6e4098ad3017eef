"""A matrix whose rows several ranks hold, the shards of one replica: what they add up, and which share of a result each exchanges.

Every function is also for a tensor that one rank holds as a whole (`spec.rows` is None); it then asks the other shards for nothing.
A sum over the shards joins what each of them has, too: with zeros elsewhere, a sum has the bits of its one summand.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ...parts.ops import Array, Ops
from ...parts.requests import AllReduce, RowSum
from ...parts.tensor import TensorSpec

#: The end of a state's key for what a compressor has learnt of the whole matrix, and not of this rank's rows alone.
OF_WHOLE = "_of_whole"


def key_of(key: str, spec: TensorSpec) -> str:
    """Returns the state's key for what is learnt of this tensor's matrix."""
    return key if spec.rows is None else key + OF_WHOLE


def share_of(spec: TensorSpec, count: int) -> slice:
    """Returns which of `count` elements that all shards know this rank exchanges with its replicas."""
    if spec.rows is None:
        return slice(0, count)
    shards, place = len(spec.rows.counts), spec.rows.place
    return slice(count * place // shards, count * (place + 1) // shards)


def added(own: Array, spec: TensorSpec) -> Generator[Any, Any, Array]:
    """Returns the sum over the shards of a flat float32 array."""
    return own if spec.rows is None else (yield RowSum(own))


def all_rows(ops: Ops, own: Array, spec: TensorSpec, columns: int) -> Generator[Any, Any, Array]:
    """Returns the rows of all shards, flat, given this rank's."""
    if spec.rows is None:
        return own
    return (yield RowSum(_placed(ops, own, spec.rows.first * columns, sum(spec.rows.counts) * columns)))


def own_rows(whole: Any, spec: TensorSpec) -> Any:
    """Returns this rank's rows of a matrix."""
    return whole if spec.rows is None else whole[spec.rows.first : spec.rows.first + spec.shape[0]]


def mean_in_shares(ops: Ops, x: Array, spec: TensorSpec) -> Generator[Any, Any, Array]:
    """Returns the replicas' mean (or sum) of a flat float32 array that all shards of a replica know: each shard exchanges its share."""
    share = share_of(spec, len(x))
    mean = yield AllReduce(x[share], "float32")
    return mean if spec.rows is None else (yield RowSum(_placed(ops, mean, share.start, len(x))))


def _placed(ops: Ops, piece: Array, first: int, count: int) -> Array:
    """Returns `count` zeros, but this piece from the place `first` on."""
    return ops.concat([ops.zeros(first), piece, ops.zeros(count - first - len(piece))])
