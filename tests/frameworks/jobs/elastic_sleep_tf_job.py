"""Trains a Keras model for 10 steps in an elastic job of 2 ranks, of which rank 1 sleeps once, for longer than GRACE_EXT_TIMEOUT. Each rank
prints 'BEGIN step' when it (again) begins, and 'END digest'."""

from __future__ import annotations

import time

import keras
import numpy as np
import tensorflow as tf

import grace_ext.frameworks.tensorflow as hvd
from grace_ext.driver.agreement import digest_of

hvd.init()
tf.config.threading.set_intra_op_parallelism_threads(1)
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression="topk(ratio=0.5) + residual")
sleeps = [9]


@hvd.elastic.run
def train(state):
    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(tf.ones((4, 3))) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    print("BEGIN", state.step, flush=True)
    while state.step < 10:
        if state.step == 5 and hvd.rank() == 1 and sleeps:
            time.sleep(sleeps.pop())
        step()
        state.step += 1
        state.commit()


train(hvd.elastic.TensorFlowKerasState(model, optimizer, step=0))
print("END", digest_of(np.concatenate([w.reshape(-1) for w in model.get_weights()])), flush=True)
