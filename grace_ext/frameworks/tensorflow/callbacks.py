"""Defines Keras 3 callbacks for data-parallel `fit`: those of Horovod, one for the metrics of compression, and one for agreement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.tensorflow as api
import keras
import numpy as np
import tensorflow as tf

from ...errors import ParameterError, UnsupportedError, warn_user
from ...metrics.metrics import TIMES, Report, scalars
from .agreement import check_agreement
from .in_front import InFront, without_xla
from .stopping import SynchronizedStop as SynchronizedStop
from .variables import broadcast_variables, shared_variables
from .watchdog import blocking

MEASURED = ("relative_error", "total_error", "residual_norm", "gradient_norm", *TIMES)


UNWRAPPED = (
    "this model's optimizer ({}) is not wrapped, so each rank trains alone: compile the model with "
    "hvd.DistributedOptimizer(optimizer, compression=...). (A model that was loaded, or compiled from a config, has a plain optimizer: use "
    "hvd.load_model.)"
)


def mention_unwrapped(model: Any, process_set: Any) -> None:
    """Warns if the model's training step exchanges nothing, as far as that can be seen: a step of the user's own may use a tape."""
    own_step = type(model).train_step is not keras.Model.train_step and type(model).train_step is not keras.Sequential.train_step
    if process_set.size() > 1 and not own_step and not isinstance(model.optimizer, InFront):
        warn_user(UNWRAPPED.format(type(model.optimizer).__name__))


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives every rank the root's model and optimizer variables when training begins. Each rank's compression memory stays its own, and so
    do the states of seed generators, which make dropout and noise: seed each rank as you want it.
    Turns jit_compile off, with a warning, if Keras's default 'auto' chose True. Warns if the model's optimizer is not wrapped."""

    def __init__(self, root_rank: int = 0, device: str = "", process_set: Any = api.global_process_set):
        super().__init__()
        self.root_rank, self.process_set = root_rank, process_set
        self._done = False

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        without_xla(model)  # Keras makes the training step after this

    def _broadcast(self) -> None:
        self._done = True
        if self.process_set.size() > 1:
            broadcast_variables([*shared_variables(self.model), *self.model.optimizer.variables], self.root_rank, self.process_set)

    def on_train_begin(self, logs: Any = None) -> None:
        self._done = False
        mention_unwrapped(self.model, self.process_set)
        if self.model.built:  # before the first step: LocalSGD measures drift from there
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self._done:  # the first batch has built the model
            self._broadcast()


class MetricAverageCallback(keras.callbacks.Callback):
    """Replaces the metrics of an epoch, numbers or arrays, by their means over the ranks that have them, by name. Put it before callbacks
    that read them. Raises ParameterError, on every rank alike, for a metric whose shapes differ."""

    def __init__(self, device: str = "", process_set: Any = api.global_process_set):
        super().__init__()
        self.process_set = process_set

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is None or not self.process_set.included() or self.process_set.size() == 1:
            return
        own = {name: np.asarray(value, np.float64) for name, value in logs.items()}
        with blocking("hvd.callbacks.MetricAverageCallback", self.process_set):
            everyone = api.allgather_object(own, name="grace.metrics", process_set=self.process_set)
        by_name = {name: [rank[name] for rank in everyone if name in rank] for name in sorted(set().union(*everyone))}
        for name, values in by_name.items():  # also those that this rank does not have, so that all ranks raise alike
            if len({value.shape for value in values}) > 1:
                raise ParameterError(f"metric {name!r} has the shapes {[v.shape for v in values]} on the ranks; their mean needs one shape")
        for name in logs:
            mean = np.mean(by_name[name], axis=0)
            logs[name] = mean if mean.ndim else float(mean)


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to initial_lr * multiplier(epoch), from start_epoch until end_epoch: at each epoch, or with staircase=False
    at each batch, as Horovod's callback does. A number as multiplier means multiplier ** (epoch - start_epoch).

    It differs from Horovod's in two things: the logs have Keras 3's key 'learning_rate', not 'lr'; and momentum_correction=True only gives
    a warning, because Keras 3 compiles the momentum into the training step, where it cannot change."""

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = False,
        steps_per_epoch: int | None = None,
    ):
        super().__init__()
        if momentum_correction:
            warn_user("momentum_correction=True has no effect: Keras 3 compiles the momentum into the training step. Leave it out")
        self.initial_lr, self.start_epoch, self.end_epoch = initial_lr, start_epoch, end_epoch
        self.staircase, self.steps_per_epoch = staircase, steps_per_epoch
        self.multiplier: Callable[[float], float] = (
            multiplier if callable(multiplier) else lambda epoch: multiplier ** (epoch - start_epoch)
        )
        self._epoch = 0

    def _set(self, epoch: float) -> None:
        if epoch >= self.start_epoch and (self.end_epoch is None or epoch < self.end_epoch):
            self.model.optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        if self.staircase:
            self._set(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if not self.staircase:
            self._set(self._epoch + batch / self._steps())

    def _steps(self) -> int:
        steps = self.steps_per_epoch or self.params.get("steps")
        if not steps:
            raise ValueError("staircase=False needs the number of steps per epoch, which is unknown here; pass steps_per_epoch")
        return steps

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from initial_lr / size to initial_lr over the first epochs (Goyal et al. 2017)."""

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = False,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
        process_set: Any = api.global_process_set,
    ):
        def multiplier(epoch: float) -> float:
            size = process_set.size()
            epoch += 1 / self._steps()  # as Horovod: the last batch of an epoch has a round number
            return (epoch * (size - 1) / warmup_epochs + 1) / size

        super().__init__(initial_lr, multiplier, 0, warmup_epochs, False, momentum_correction, steps_per_epoch)
        self.warmup_epochs, self.verbose = warmup_epochs, verbose

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        if epoch == self.warmup_epochs:
            self.model.optimizer.learning_rate = self.initial_lr
            if self.verbose and api.rank() == 0:
                print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self.initial_lr:g}.")


class CompressionMetricsCallback(keras.callbacks.Callback):
    """Adds to each epoch's logs `wire_bytes` (bytes per rank and step) and `compression_ratio` (dense bytes / sent bytes).

    every: turns metrics on (metrics/metrics.py), with a report every so many steps, and also adds the values for the whole model:
      `relative_error`, `total_error`, `residual_norm`, `gradient_norm`, `encode_seconds`, `communicate_seconds`, `decode_seconds`.
    jsonl: a file for the reports, as lines of JSON. tensorboard: a folder to which rank 0 writes their numbers. Either implies every=100.
    options: as for Metrics."""

    def __init__(self, every: int | None = None, *, jsonl: str | Path | None = None, tensorboard: str | Path | None = None, **options: Any):
        super().__init__()
        self.every = 100 if every is None and (jsonl or tensorboard) else every
        # Reports are made inside the training step, but TensorBoard's files are written outside of it.
        self._reports: list[Report] = []
        self.options = {**options, "jsonl": jsonl, "sinks": [*options.get("sinks", ()), *([self._reports.append] if tensorboard else ())]}
        self._folder, self._on = tensorboard, False
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        if not hasattr(self.model.optimizer, "wire_bytes"):
            raise UnsupportedError(
                f"CompressionMetricsCallback reports what hvd.DistributedOptimizer sends, and this model's optimizer is a plain "
                f"{type(self.model.optimizer).__name__}: compile the model with hvd.DistributedOptimizer(optimizer, compression=...)"
            )
        if self.every is not None and not hasattr(self.model.optimizer, "measure"):
            raise UnsupportedError("LocalSGD has no metrics: leave out every=, jsonl= and tensorboard=; the logs have wire_bytes")
        if self.every is not None and not self._on:  # a second fit goes on with them
            self.model.optimizer.measure(self.every, **self.options)
            self._on = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        while self._reports:
            report = self._reports.pop(0)
            if report["rank"] == 0:
                self._write(report)

    def _write(self, report: Report) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self._folder))
        with self._writer.as_default():
            for tag, value in scalars(report):
                tf.summary.scalar(tag, value, step=report["step"])
        self._writer.flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        sent = self.model.optimizer.wire_bytes
        dense = sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in self.model.trainable_variables)
        if logs is not None and sent:
            logs["wire_bytes"], logs["compression_ratio"] = sent, dense / sent
            total = self.model.optimizer.metrics().get("total", {})
            logs.update({key: total[key] for key in MEASURED if total.get(key) is not None})


class AgreementCallback(keras.callbacks.Callback):
    """Calls check_agreement every `every` batches and at the end of training: DisagreementError on all ranks alike if their specs, steps
    or trained variables differ."""

    def __init__(self, every: int = 100):
        super().__init__()
        if every < 1:
            raise ParameterError(f"every must be at least 1 batch, got {every}")
        self.every, self._batches = every, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches += 1
        if self._batches % self.every == 0:
            check_agreement(self.model.optimizer)

    def on_train_end(self, logs: Any = None) -> None:
        check_agreement(self.model.optimizer)
