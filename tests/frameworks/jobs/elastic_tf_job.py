"""Does the same as elastic_job.py with Keras `fit`, with commits between batches. Arguments and lines are the same."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import keras
import numpy as np

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.driver.agreement import digest_of

FOLDER, SPEC = Path(sys.argv[1]), sys.argv[2]


def tell(*words):
    with (FOLDER / f"{os.getpid()}.txt").open("a") as file:
        print(*words, file=file)


hvd.init()
keras.utils.set_random_seed(7 + hvd.rank())  # the initial weights of a new rank must not matter
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)])
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, 0.5), compression=grace_ext.grace(SPEC)), "mse", jit_compile=False)


class Told(keras.callbacks.Callback):
    """Counts steps, logs them, and commits every fourth."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def on_train_batch_end(self, batch, logs=None):
        self.state.step += 1
        tell("STEP", hvd.rank(), hvd.size(), self.state.step, logs["loss"], time.monotonic())
        if self.state.step % 4 == 0:
            self.state.commit()


@hvd.elastic.run
def train(state):
    tell("BEGIN", hvd.rank(), hvd.size(), state.step, os.environ["HOROVOD_HOSTNAME"])
    draw = np.random.default_rng(hvd.rank() % 3)
    x = draw.standard_normal((32, 8)).astype(np.float32)
    y = np.sin(x.sum(1, keepdims=True)).astype(np.float32)
    while not hvd.broadcast_object((FOLDER / "stop").exists(), name="stop"):
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[Told(state)])
        hvd.check_agreement(model.optimizer, model)
    tell("END", hvd.rank(), hvd.size(), "-".join(digest_of(v.numpy()) for v in model.variables))


train(hvd.elastic.TensorFlowKerasState(model, step=0))
hvd.shutdown()
