"""Cases of hvd.callbacks.SynchronizedStop on 2 ranks: they stop together. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import ParameterError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import raises, run_cases  # noqa: E402

BATCHES, EPOCHS = 4, 6
tf.config.threading.set_intra_op_parallelism_threads(1)


class Stop(keras.callbacks.Callback):
    """Stops this rank's training in epoch 2: after this batch, or at the end."""

    def __init__(self, batch=None):
        super().__init__()
        self.batch, self.epoch = batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (2, self.batch):
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if (epoch, self.batch) == (2, None):
            self.model.stop_training = True


def data(batches=BATCHES):
    x = np.random.default_rng(hvd.rank()).normal(size=(8 * batches + 5, 3)).astype(np.float32)
    return tf.data.Dataset.from_tensor_slices((x, x.sum(1, keepdims=True))).batch(8, drop_remainder=True)


def trained(own, dataset=None, every=None, **options):
    """Returns the epochs and batches that fit made, the same on all ranks, with callbacks that are this rank's own."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), compression="topk(ratio=0.5) + residual")
    model.compile(optimizer, "mse", jit_compile=False)
    callbacks = [*own, hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.SynchronizedStop(every)]
    history = model.fit(data() if dataset is None else dataset, callbacks=callbacks, verbose=0, **{"epochs": EPOCHS, **options})
    made = history.epoch, int(optimizer.iterations.numpy()), [w.tobytes() for w in model.get_weights()]
    assert hvd.allgather_object(made) == [made] * hvd.size()
    return made[:2]


def on_rank(rank, *callbacks):
    return list(callbacks) if hvd.rank() == rank else []


def case_a_stop_at_the_end_of_an_epoch():
    for rank in (0, 1):
        assert trained(on_rank(rank, Stop())) == ([0, 1, 2], 3 * BATCHES)
    early = keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=2)  # as if the loss no longer improved
    assert trained(on_rank(1, early)) == ([0, 1, 2], 3 * BATCHES)


def case_a_stop_in_an_epoch_waits_for_its_end_or_the_next_comparison():
    for batch in (0, 1):
        assert trained(on_rank(1, Stop(batch))) == ([0, 1, 2], 3 * BATCHES)
        assert trained(on_rank(1, Stop(batch)), every=2) == ([0, 1, 2], 2 * BATCHES + 2)
    assert trained(on_rank(1, Stop(0)), every=1) == ([0, 1, 2], 2 * BATCHES + 1)


def case_nan_on_one_rank():
    x = np.ones((8 * BATCHES, 3), np.float32)
    x[8:, :] = np.nan if hvd.rank() else 1.0  # from the second batch
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(8)
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), compression="none"), "mse", jit_compile=False)
    callbacks = [*on_rank(1, keras.callbacks.TerminateOnNaN()), hvd.callbacks.SynchronizedStop()]
    assert model.fit(dataset, epochs=EPOCHS, callbacks=callbacks, verbose=0).epoch == [0]


def case_all_ranks_begin_where_the_root_has_restored_a_backup():
    with tempfile.TemporaryDirectory() as folder:
        backup = on_rank(0, keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False))
        assert trained(backup, epochs=2) == ([0, 1], 2 * BATCHES)
        assert trained(backup) == ([2, 3, 4, 5], 6 * BATCHES)  # `iterations` was restored, too


def case_uneven_batches_with_repeat():
    assert trained([], data(BATCHES - hvd.rank()).repeat(), steps_per_epoch=BATCHES) == (list(range(EPOCHS)), EPOCHS * BATCHES)


def case_uneven_numbers_are_refused():
    raises(ParameterError, "numbers of batches per epoch, by rank: [4, 3]", lambda: trained([], data(BATCHES - hvd.rank())))
    raises(ParameterError, "numbers of epochs, by rank: [6, 7]", lambda: trained([], epochs=EPOCHS + hvd.rank()))
    raises(ParameterError, "in the epochs [0, 1], by rank", lambda: trained([], initial_epoch=hvd.rank()))
    raises(ParameterError, "at least 1 batch", lambda: hvd.callbacks.SynchronizedStop(every=0))


hvd.init()
run_cases(hvd, globals())
