"""Gives variables the same values on all ranks."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as api
import tensorflow as tf

from ...errors import DisagreementError
from .watchdog import blocking

SAME = "build the same model on every rank before its variables are broadcast"
#: The element types that Horovod's operations take; what has another type travels as an object.
OF_HOROVOD = {"uint8", "int8", "int32", "int64", "float16", "float32", "float64", "bool"}


def variable_of(variable: Any) -> tf.Variable:
    """Returns the tf.Variable itself, or the one inside a Keras 3 variable."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def broadcast_variables(variables: Any, root_rank: int, process_set: Any = api.global_process_set, **options: Any) -> None:
    """Gives every rank the root's values of these tf.Variables or Keras 3 variables, of any type. Variables belong together by their place:
    their names may differ by rank. options: Horovod's, without effect.

    Raises DisagreementError, on every rank alike, if the ranks' numbers of variables, their shapes or their types differ."""
    inner = [variable_of(v) for v in variables]
    if not process_set.included() or process_set.size() == 1:
        return
    with blocking("hvd.broadcast_variables", process_set):
        _broadcast(inner, root_rank, process_set)


def _broadcast(inner: list[tf.Variable], root_rank: int, process_set: Any) -> None:
    _check_same([[list(v.shape), v.dtype.name, v.name] for v in inner], process_set)
    named = {f"grace.broadcast.{place}": v for place, v in enumerate(inner) if v.dtype.name in OF_HOROVOD}

    @tf.function
    def received() -> list[tf.Tensor]:  # in a graph Horovod may send several at a time
        how = {"process_set": process_set, "ignore_name_scope": True}
        return [api.broadcast(v.read_value(), root_rank, name=name, **how) for name, v in named.items()]

    for variable, value in zip(named.values(), received() if named else [], strict=True):
        variable.assign(value)
    for variable in [v for v in inner if v.dtype.name not in OF_HOROVOD]:  # bfloat16, unsigned integers, strings
        value = api.broadcast_object(variable.numpy(), root_rank, process_set=process_set)
        variable.assign(tf.constant(value, variable.dtype))


def _check_same(mine: list[list[Any]], process_set: Any) -> None:
    """Raises DisagreementError if the ranks' variables, as [shape, dtype, name], differ in more than names."""
    everyone = api.allgather_object(mine, name="grace.broadcast", process_set=process_set)
    first = everyone[0]
    for rank, its in zip(process_set.ranks, everyone, strict=True):
        if len(its) != len(first):
            raise DisagreementError(f"rank {rank} broadcasts {len(its)} variables, rank {process_set.ranks[0]} {len(first)}; {SAME}", [])
        for place, (own, other) in enumerate(zip(its, first, strict=True)):
            if own[:2] != other[:2]:
                what = f"variable {place} is {own[2]} ({own[1]} {own[0]}) on rank {rank}, and {other[2]} ({other[1]} {other[0]})"
                raise DisagreementError(f"{what} on rank {process_set.ranks[0]}; {SAME}", [])


def shared_variables(model: Any) -> list[Any]:
    """Returns the variables of a Keras model that all ranks shall have alike: all but the states of seed generators. With one state on
    all ranks, dropout would drop the same elements of every rank's batch."""
    return [v for v in model.variables if v.path.rsplit("/", 1)[-1] != "seed_generator_state"]
