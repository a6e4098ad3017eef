"""Cases of many simultaneous collectives, of the ownership of results, and of variables on a GPU, in graphs on 2 ranks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from unittest import mock

import horovod.tensorflow as horovod
import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.frameworks.tensorflow import host_copies

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import heard, run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
tf.config.threading.set_intra_op_parallelism_threads(1)


def case_several_buckets_and_models_in_one_graph():
    """Results are right if many collectives of one kind are under way at once; each variable is its own bucket."""
    models = [[tf.Variable(tf.zeros([4_000_000])) for _ in range(3)] for _ in range(2)]
    graces = [grace_ext.grace("none"), grace_ext.grace("none")]

    @tf.function(autograph=False)
    def exchanged():
        with tf.GradientTape(persistent=True) as tape:
            losses = [sum((i + hvd.rank()) * tf.reduce_sum(v) for i, v in enumerate(variables)) for variables in models]
        tapes = [hvd.DistributedGradientTape(tape, compression=g) for g in graces]
        return [t.gradient(loss, variables) for t, loss, variables in zip(tapes, losses, models, strict=True)]

    for _ in range(2):
        for gradients in exchanged():
            for i, gradient in enumerate(gradients):
                assert float(tf.reduce_min(gradient)) == float(tf.reduce_max(gradient)) == i + 0.5


def overwritten(variable, mean):
    variable.assign(mean)  # may take over the memory of `mean`
    variable.assign_add(tf.ones_like(variable))
    return variable - 1


def exchanges_by(spec, then):
    """Returns a step that exchanges a given gradient of a variable and applies `then` to the variable and the aggregate."""
    g, variable = grace_ext.grace(spec), tf.Variable(tf.zeros([150, 200]), name="v")

    @tf.function(autograph=False)
    def step(gradient):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * gradient)
        return then(variable, hvd.DistributedGradientTape(tape, compression=g).gradient(loss, [variable])[0])

    return step


def case_results_are_the_users():
    """Results of a step do not change later, and writing to them does not change later results."""
    draws = [np.random.default_rng(seed).standard_normal((150, 200)).astype(np.float32) for seed in range(10)]
    for spec in ("none", TOPK, "topk(ratio=0.1) + ef21", "topk(ratio=0.1) + gradient_compression", "powersgd(rank=2) + residual"):
        cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 2)
        expected = [cluster.step([{"v:0": draws[i]}, {"v:0": draws[i + 1]}])["v:0"] for i in range(0, 10, 2)]
        for then in (lambda variable, mean: mean, overwritten):
            step = exchanges_by(spec, then)
            got = [step(tf.constant(draws[i + hvd.rank()])) for i in range(0, 10, 2)]
            for one, other in zip(got, expected, strict=True):
                assert np.abs(one.numpy() - other).max() <= 1e-5, (spec, then.__name__)


def traced(variables, wrap):
    """Runs two steps of one graph in which `wrap` makes the tape for the gradients of these variables."""

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(v) for v in variables)
        return wrap(tape).gradient(loss, variables)

    step()
    step()


def fitted(wrap):
    """Trains a Keras model, whose variables have 24 bytes, for three steps with the optimizer that `wrap` makes."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="ones")])
    model.compile(wrap(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    model.fit(np.ones((6, 2)), np.ones((6, 2)), batch_size=2, verbose=0)


def case_variables_on_a_gpu_are_told_of_once():
    """Every wrapper logs on rank 0, once per process, what copies through the host cost; rank 1 logs nothing, and variables on a CPU are
    not worth a word. No GPU is here: variables only say that they are on one."""
    where = "/job:localhost/replica:0/task:0/device:{}:0"
    sizes = [3_000_000, 500_000]
    g, bound, private = (grace_ext.grace(TOPK) for _ in range(3))

    def bind(variables):
        compression = bound.bind(variables)
        traced(variables, lambda tape: horovod.DistributedGradientTape(tape, compression=compression))

    def examples(optimizer):
        chosen = hvd.Privacy(clip=1.0, noise_multiplier=1.0, unit="example", sample_rate=0.5, batch=2)
        optimizer = hvd.DistributedOptimizer(optimizer, compression=private, privacy=chosen)
        variables = [keras.Variable(np.zeros(500_000, np.float32))]
        optimizer.build(variables)
        optimizer.apply([tf.ones([2, 500_000])], variables)

    uses = {
        "2 of 2 variables are on a {} device, .*each exchange copies 14 MB of gradients to the host and 14 MB back": lambda: traced(
            [tf.Variable(tf.zeros([size])) for size in sizes], lambda tape: hvd.DistributedGradientTape(tape, compression=g)
        ),
        "each exchange copies 14 MB of gradients to the host": lambda: bind([tf.Variable(tf.zeros([size])) for size in sizes]),
        "each exchange copies 2.4e-05 MB of gradients to": lambda: fitted(lambda sgd: hvd.DistributedOptimizer(sgd, compression=TOPK)),
        "each synchronization copies 2.4e-05 MB of the model": lambda: fitted(lambda sgd: hvd.LocalSGD(sgd, TOPK, every=2)),
        "each exchange copies 2 MB of gradients per example to the host and 2 MB back": lambda: examples(keras.optimizers.SGD(0.1)),
    }
    for device in ("GPU", "XPU", "CPU"):
        for expected, use in uses.items():
            host_copies._told.clear()
            at = mock.PropertyMock(return_value=where.format(device))
            with heard() as said, mock.patch.object(type(tf.Variable(0.0)), "device", at):
                use()
                use()
            if hvd.rank() == 0 and device != "CPU":
                assert len(said) == 1, (device, expected, said)
                assert re.search(expected.format(device), said[0]) and "--host-copy" in said[0], (expected, said)
            else:
                assert said == [], (hvd.rank(), device, said)
    assert host_copies.device_type(tf.Variable(0.0)) == host_copies.device_type(keras.Variable(0.0)) == "CPU"


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
