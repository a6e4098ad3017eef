"""Defines the Keras callback with which the ranks begin at the same epoch and stop at the same batch."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as api
import keras
import tensorflow as tf

from ...errors import ParameterError
from .watchdog import blocking

UNEVEN = (
    "the ranks' fit has these numbers of {what}, by rank: {by_rank}. They must be equal, because in every step each rank waits for all: "
    "give every rank the same number of {same}"
)
BATCHES = (
    "samples, with drop_remainder=True in batch(); or let the dataset repeat() and give fit the same steps_per_epoch= on every rank "
    "(docs/faults.md)"
)


class SynchronizedStop(keras.callbacks.Callback):
    """Stops training on all ranks together if any rank's `model.stop_training` is set (EarlyStopping, TerminateOnNaN, your own callbacks):
    otherwise a rank that stops alone leaves the others waiting. Put it last in the list, on every rank.

    Training stops at the end of the epoch. A stop in the middle of one is put off until then, so that no step needs a collective of its
    own. every: also compares after every so many batches, and stops there; this costs one more small collective each time.

    When training begins, all ranks take the root's first epoch (BackupAndRestore may have restored one), and ParameterError is raised on
    every rank alike if their numbers of epochs or of batches per epoch are known and differ."""

    def __init__(self, every: int | None = None, root_rank: int = 0, process_set: Any = api.global_process_set):
        super().__init__()
        if every is not None and every < 1:
            raise ParameterError(f"every must be None or at least 1 batch, got {every}")
        self.every, self.root_rank, self.process_set = every, root_rank, process_set
        self._batches, self._epoch, self._put_off = 0, 0, False

    @property
    def _alone(self) -> bool:
        return not self.process_set.included() or self.process_set.size() == 1

    def on_train_begin(self, logs: Any = None) -> None:
        self._batches, self._put_off = 0, False
        if self._alone:
            return
        own = (self.params.get("epochs"), self.params.get("steps"), self.model._initial_epoch)
        with blocking("hvd.callbacks.SynchronizedStop", self.process_set):
            everyone = api.allgather_object(own, name="grace.stop.begin", process_set=self.process_set)
        epochs, steps, first = zip(*everyone, strict=True)
        if len(set(epochs)) > 1:
            raise ParameterError(UNEVEN.format(what="epochs", by_rank=list(epochs), same="epochs="))
        if None not in steps and len(set(steps)) > 1 and not self._asynchronous:
            raise ParameterError(UNEVEN.format(what="batches per epoch", by_rank=list(steps), same=BATCHES))
        ranks = self.process_set.ranks or list(range(len(everyone)))
        self.model._initial_epoch = first[ranks.index(self.root_rank)]

    @property
    def _asynchronous(self) -> bool:
        """Whether the ranks make steps without waiting for each other: LocalSGD(asynchronous=True)."""
        settings = getattr(getattr(self.model.optimizer, "_grace", None), "settings", None)
        return getattr(settings, "asynchronous", False)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._batches += 1
        if self._alone:
            return
        if self.every is not None and self._batches % self.every == 0:
            self._compare()
        elif self.model.stop_training:
            self._put_off, self.model.stop_training = True, False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if not self._alone:
            self._compare()

    def _compare(self) -> None:
        """Lets all ranks stop if one wants to. Raises ParameterError on every rank alike if they are in different epochs."""
        own = tf.constant([[int(self._put_off or self.model.stop_training), self._epoch]], tf.int32)
        with blocking("hvd.callbacks.SynchronizedStop", self.process_set):
            everyone = api.allgather(own, name="grace.stop", process_set=self.process_set, ignore_name_scope=True)
        stops, epochs = everyone.numpy().T.tolist()
        if len(set(epochs)) > 1:
            raise ParameterError(
                f"the ranks are in the epochs {epochs}, by rank, so they would not end together: give every rank's fit the same "
                "initial_epoch=, and put SynchronizedStop last in the list of callbacks (behind BackupAndRestore)"
            )
        self._put_off, self.model.stop_training = False, any(stops)
