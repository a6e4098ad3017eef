"""Cases of `g.bind(variables)` with unmodified horovod.tensorflow on 2 ranks."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

import grace_ext
from grace_ext.errors import UnboundError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tf_training as problem  # noqa: E402
from cases import raises, run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"


def train(variables, bound, graph, bad_step=None, **options):
    def one_step(step, rank):
        with tf.GradientTape() as tape:
            loss = problem.loss_of(variables, rank, step)
        tape = hvd.DistributedGradientTape(tape, compression=bound, **options)
        return tape.gradient(loss, variables)

    run = tf.function(one_step) if graph else one_step
    for step in range(problem.STEPS):
        for v, g in zip(variables, run(step, hvd.rank()), strict=True):
            v.assign(v - problem.LR * g)


def check(spec, graph, **options):
    variables = problem.tf_variables()
    train(variables, grace_ext.grace(spec).bind(variables), graph, **options)
    expected = problem.train_in_cluster(spec, 2, [v.name for v in variables])
    for v, w in zip(variables, expected.values(), strict=True):
        assert np.abs(v.numpy() - w).max() <= 1e-6, spec


def case_eager():
    for spec in problem.SPECS:
        check(spec, graph=False)


def case_graph():
    for spec in (TOPK, "powersgd(rank=2) + residual"):
        check(spec, graph=True)


def case_a_threshold_by_the_size_of_the_model():
    """k is for the whole model, although each variable has an exchange of its own."""
    variables = problem.tf_variables()
    train(variables, grace_ext.grace("threshold(like_topk=1) + residual").bind(variables), graph=True)
    least = 1 / (2 * math.sqrt(sum(int(np.prod(v.shape)) for v in variables)))
    expected = problem.train_in_cluster(f"threshold(threshold={least!r}) + residual", 2, [v.name for v in variables])
    for v, w in zip(variables, expected.values(), strict=True):
        assert np.abs(v.numpy() - w).max() <= 1e-6


def case_metrics():
    """Each variable has its own exchange; a report covers all of them."""
    variables, lines = problem.tf_variables(), []
    bound = grace_ext.grace(TOPK).bind(variables)
    bound.measure(every=2, sinks=[lines.append])
    train(variables, bound, graph=True)
    report = bound.metrics()
    assert len(report["parameters"]) == len(variables) and report["total"]["bytes"] == bound.wire_bytes
    assert 0 < report["total"]["relative_error"] < 1
    assert [line["step"] for line in lines] == list(range(0, problem.STEPS, 2)), [line["step"] for line in lines]
    assert all(len(line["parameters"]) == len(variables) for line in lines)


def case_groups():
    check(TOPK, graph=True, groups=1)


def case_state_is_committed_by_step():
    variables = problem.tf_variables()
    bound = grace_ext.grace(TOPK).bind(variables)

    def gradients(scale):
        with tf.GradientTape() as tape:
            loss = problem.loss_of(variables, hvd.rank(), 1)
            loss = loss + scale * tf.reduce_sum(variables[1])  # an infinite scale affects the gradient of one variable only
        return hvd.DistributedGradientTape(tape, compression=bound).gradient(loss, variables)

    gradients(0.0)
    before = bound.state_dict()
    result = gradients(np.inf if hvd.rank() == 1 else 0.0)
    assert np.isnan(result[1].numpy()).any() and np.isfinite(result[0].numpy()).all()
    after = bound.state_dict()
    for name, state in before.items():
        for key, array in state["state"].items():
            assert np.array_equal(after[name]["state"][key], array), key


def case_unbound_is_refused_at_construction():
    g = grace_ext.grace(TOPK)
    raises(UnboundError, "grace_ext.frameworks.tensorflow", lambda: hvd.DistributedGradientTape(tf.GradientTape(), compression=g))
    raises(UnboundError, "grace_ext.frameworks.tensorflow", lambda: hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=g))


def case_keras_3_variables_are_refused():
    variable = keras.Variable(np.ones(3, np.float32))
    raises(UnsupportedError, "Keras 3", lambda: grace_ext.grace(TOPK).bind([variable]))


def case_variables_that_start_differently():
    """They are told at the second step, because Horovod's scripts may broadcast after the first."""

    def trained(graph, broadcast_at, **options):
        variables = problem.tf_variables()
        variables[0].assign_add(tf.ones_like(variables[0]) * hvd.rank())
        bound = grace_ext.grace(TOPK).bind(variables, **options)

        def one_step(step):
            with tf.GradientTape() as tape:
                loss = problem.loss_of(variables, hvd.rank(), step)
            return hvd.DistributedGradientTape(tape, compression=bound).gradient(loss, variables)

        run = tf.function(one_step) if graph else one_step
        for step in range(3):
            if step == broadcast_at:
                hvd.broadcast_variables(variables, root_rank=0)
            for v, g in zip(variables, run(step), strict=True):
                v.assign(v - problem.LR * g)
        everyone = hvd.allgather(tf.reshape(variables[0], [1, -1])).numpy()
        return (everyone[0] == everyone[1]).all()

    for graph in (False, True):
        raises(Exception, "parameters differ", lambda: trained(graph, -1))  # noqa: B023
        assert trained(graph, 0) and trained(graph, 1)
        assert not trained(graph, -1, check_start=False)


def case_disagreement():
    variables = problem.tf_variables()
    bound = grace_ext.grace([TOPK, "qsgd"][hvd.rank()]).bind(variables)
    # TensorFlow wraps errors of traced user code in its own error class, with the same text.
    raises(Exception, "rank 1 uses 'qsgd @ allgather'", lambda: train(variables, bound, graph=True))


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
