"""Cases of many simultaneous collectives, and of the ownership of results, in graphs on 2 ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import run_cases  # noqa: E402

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


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
