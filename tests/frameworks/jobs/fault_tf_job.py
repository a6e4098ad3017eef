"""Trains a Keras model on 2 ranks, of which rank 1 does something else than rank 0 (WHAT), and logs what each sees.

    fault_tf_job.py WHAT FOLDER [graph | eager | SPEC]

The file <rank>.txt gets 'PID pid', 'LEFT time' when rank 1 leaves the common way, 'LOG text' for what grace_ext logs, and finally 'END' or
'ERROR time class: text'. Rank 1 stays alive until the file 'over' is there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext.frameworks.tensorflow as hvd

WHAT, FOLDER, HOW = sys.argv[1], Path(sys.argv[2]), (sys.argv[3:] or ["graph"])[0]
SPEC = "topk(ratio=0.5) + residual" if HOW in ("graph", "eager") else HOW
BATCHES, EPOCHS = 4, 6
hvd.init()
RANK = hvd.rank()
OTHER = RANK == 1  # the rank that does something else
tf.config.threading.set_intra_op_parallelism_threads(1)


def tell(*words):
    with (FOLDER / f"{RANK}.txt").open("a") as file:
        print(*words, file=file)


class Logged(logging.Handler):
    def emit(self, record):
        tell("LOG", " ".join(record.getMessage().split()))


class Leave(keras.callbacks.Callback):
    """Notes the time at the end of each epoch from this one, and then calls a function."""

    def __init__(self, epoch=0, call=lambda model: None):
        super().__init__()
        self.epoch, self.call = epoch, call

    def on_epoch_end(self, epoch, logs=None):
        if epoch >= self.epoch:
            tell("LEFT", time.time())
            self.call(self.model)


def stop(model):
    model.stop_training = True


def data():
    batches = BATCHES - 1 if OTHER and "fewer batches" in WHAT else BATCHES
    x = np.random.default_rng(RANK).normal(size=(8 * batches, 3)).astype(np.float32)
    found = tf.data.Dataset.from_tensor_slices((x, x.sum(1, keepdims=True))).batch(8)
    return found.filter(lambda x, y: True) if "unknown" in WHAT else found


def main():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.01)
    if WHAT != "averages no metrics":  # there, nothing but the callback communicates
        optimizer = hvd.DistributedOptimizer(optimizer, compression=SPEC)
    model.compile(optimizer, "mse", jit_compile=False, run_eagerly=HOW == "eager")
    callbacks = []
    if WHAT == "averages no metrics":
        callbacks += [] if OTHER else [hvd.callbacks.MetricAverageCallback()]
    elif WHAT != "broadcasts nothing" or not OTHER:
        callbacks.append(hvd.callbacks.BroadcastGlobalVariablesCallback(0))
    if WHAT == "stops early" and OTHER:
        callbacks.append(Leave(2, stop))
    elif WHAT == "is stopped" and OTHER:
        callbacks.append(Leave(2, lambda model: os.kill(os.getpid(), signal.SIGSTOP)))
    elif "of unknown number" in WHAT:
        callbacks += [Leave(), hvd.callbacks.SynchronizedStop()]
    model.fit(data(), epochs=EPOCHS, callbacks=callbacks, verbose=0)
    tell("LEFT", time.time())
    tell("END")


logging.getLogger("grace_ext").addHandler(Logged())
tell("PID", os.getpid())
try:
    main()
except Exception as error:
    tell("ERROR", time.time(), f"{type(error).__name__}:", " ".join(str(error).split()))
    raise
finally:
    while OTHER and not (FOLDER / "over").exists():
        time.sleep(0.1)
