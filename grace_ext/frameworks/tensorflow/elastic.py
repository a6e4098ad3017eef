"""Supports elastic Horovod (`hvd.elastic`) with compression for Keras 3: `run`, `TensorFlowKerasState`, a callback; and Horovod's
TensorFlowState.

Each rank has its own memory, which is committed and rolled back with the model. When ranks leave or join, it is converted for the new
ranks before training goes on. (Horovod 0.28's own Keras state calls `optimizer.variables()`, which is no method in Keras 3.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as api
import horovod.tensorflow.elastic as horovod_elastic
import keras
import tensorflow as tf
from horovod.common.elastic import ObjectState
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.elastic import TensorFlowState as TensorFlowState

from ...checkpoints.elastic import carried_over, check_how
from ...errors import GraceError
from .optimizer import _Distributed
from .variables import broadcast_variables, shared_variables
from .watchdog import WATCHDOG, blocking


class TensorFlowKerasState(ObjectState):
    """Holds a Keras model, its optimizer, and attributes that all ranks share. If the optimizer is a DistributedOptimizer of grace_ext, it
    also holds each rank's memory.

    model: must be built (else GraceError). optimizer: by default the model's. resize: how the memory is converted when the number of ranks
    changes, see hvd.elastic.TorchState of grace_ext.frameworks.torch.
    """

    def __init__(self, model: Any, optimizer: Any = None, *, resize: str = "mean", **attributes: Any):
        if not model.built:
            raise GraceError("the model must be built first: call model.build(input_shape)")
        self.model, self.optimizer, self._resize = model, optimizer or model.optimizer, check_how(resize)
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._save_model()
        super().__init__(bcast_object=api.broadcast_object, get_rank=api.rank, **attributes)

    def _variables(self) -> list[Any]:
        return [*self.model.variables, *self.optimizer.variables]

    def _save_model(self) -> None:
        self._saved_values = [v.numpy().copy() for v in self._variables()]
        ours = isinstance(self.optimizer, _Distributed)
        self._saved_memory = self.optimizer.grace_state_dict() if ours else None  # its arrays are copies

    def save(self) -> None:
        """Keeps copies of everything that it holds, for `restore`."""
        self._save_model()
        super().save()

    def restore(self) -> None:
        """Restores what was saved last."""
        for variable, value in zip(self._variables(), self._saved_values, strict=True):
            variable.assign(value)
        if self._saved_memory is not None:
            self.optimizer.load_grace_state_dict(self._saved_memory)
        super().restore()

    def sync(self) -> None:
        """Gives all ranks rank 0's variables and attributes, but the states of seed generators. The memory follows in `settle`."""
        broadcast_variables([*shared_variables(self.model), *self.optimizer.variables], root_rank=0)
        super().sync()

    def settle(self) -> None:
        """Converts the memory for the present ranks, and saves all. Collective: `run` calls it on all ranks each time before it calls the
        function. Keras then makes its training step anew."""
        if isinstance(self.optimizer, _Distributed):
            gather = functools.partial(api.allgather_object, name="grace.elastic")
            how = {"rank": api.rank(), "size": api.size(), "how": self._resize}
            with blocking("hvd.elastic.run"):
                self.optimizer._grace.move(functools.partial(carried_over, gather, **how))
            self.model.train_function = None
        self.save()


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state after every `batches_per_commit` batches, and after each epoch."""

    def __init__(self, state: Any, batches_per_commit: int = 1):
        super().__init__()
        self.state, self.batches_per_commit, self._batches = state, batches_per_commit, 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._batches = 0  # so that all ranks count from the same batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches += 1
        if self._batches % self.batches_per_commit == 0:
            self.state.commit()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state.commit()


def run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `function(state, ...)`, as Horovod's `run` does, and again from the last commit after ranks have failed, left or joined."""

    @functools.wraps(function)
    def settled(state: Any, *args: Any, **options: Any) -> Any:
        try:
            if isinstance(state, TensorFlowKerasState):
                state.settle()
            return function(state, *args, **options)
        except (tf.errors.UnknownError, tf.errors.InternalError, tf.errors.AbortedError) as error:
            if "Horovod" not in str(error):
                raise
            raise HorovodInternalError(str(error)) from error
        finally:
            WATCHDOG.settle()

    return horovod_elastic.run(settled)
