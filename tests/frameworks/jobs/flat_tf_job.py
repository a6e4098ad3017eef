"""Makes and drops 50 of each TensorFlow wrapper on 2 ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import horovod.tensorflow as horovod
import keras
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import run_cases  # noqa: E402
from flat import MODEL, assert_flat  # noqa: E402

SPEC = "topk(ratio=0.01) + residual"
tf.config.threading.set_intra_op_parallelism_threads(1)


def made():
    return keras.Variable(tf.ones([MODEL // 4])), keras.optimizers.SGD(0.1)


def train(variable, optimizer, steps=2):
    for _ in range(steps):
        optimizer.apply([tf.ones([MODEL // 4])], [variable])


def case_distributed_optimizer():
    def use():
        variable, plain = made()
        train(variable, hvd.DistributedOptimizer(plain, compression=SPEC))
        return weakref.ref(variable)

    assert_flat(use)


def case_local_sgd():
    def use():
        variable, plain = made()
        train(variable, hvd.LocalSGD(plain, SPEC, every=2))
        return weakref.ref(variable)

    assert_flat(use)


def case_tape():
    def use():
        variable = tf.Variable(tf.ones([MODEL // 4]))
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variable**2)
            hvd.DistributedGradientTape(tape, compression=SPEC).gradient(loss, [variable])
        return weakref.ref(variable)

    assert_flat(use)


def case_bind():
    def use():
        variable = tf.Variable(tf.ones([MODEL // 4]))
        bound = grace_ext.grace(SPEC).bind([variable])

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variable**2)
            return horovod.DistributedGradientTape(tape, compression=bound).gradient(loss, [variable])

        for _ in range(2):
            step()
        return weakref.ref(variable)  # Horovod keeps `bound`, which has let go of all that is large

    assert_flat(use)


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
