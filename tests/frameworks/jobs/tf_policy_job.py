"""Cases of policies in grace_ext.frameworks.tensorflow on 2 ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import horovod.tensorflow as plain
import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import UnsupportedError
from grace_ext.frameworks.tensorflow.loop import LoopExchange

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import policies  # noqa: E402
import tf_training as problem  # noqa: E402
from cases import heard, raises, run_cases  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(1)
EVERY = "every(2, powersgd(rank=2) + residual, topk(ratio=0.1) + residual)"


def values(variables):
    return [np.asarray(v.numpy()) for v in variables]


def assert_as_in_cluster(variables, spec, names):
    expected = problem.train_in_cluster(spec, 2, names)
    for one, other in zip(values(variables), expected.values(), strict=True):
        assert np.abs(one - other).max() <= 1e-6, (spec, np.abs(one - other).max())
    mine = tf.constant(np.concatenate([v.reshape(-1) for v in values(variables)]))
    both = hvd.allgather(mine[None]).numpy()
    assert both[0].tobytes() == both[1].tobytes(), spec


def case_keras_optimizer_in_one_traced_graph():
    """Every policy works in a function that is traced once."""
    for spec in policies.SPECS:
        variables = problem.keras_variables()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=grace_ext.grace(spec))
        optimizer.build(variables)
        apply, traces = problem.in_a_graph(optimizer, variables)
        sent = []
        for step in range(problem.STEPS):
            apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step))
            sent.append(optimizer.wire_bytes)
        assert len(traces) == 1 and (len(set(sent)) > 1) == grace_ext.grace(spec).route.changes, (spec, sent)
        assert_as_in_cluster(variables, spec, [v.path for v in variables])


def case_tape_in_eager_code_and_in_graphs():
    for graph in (False, True):
        for spec in (EVERY, policies.SPECS[-1]):
            variables = problem.tf_variables()
            problem.train_by_tape(hvd, variables, grace_ext.grace(spec), graph)
            assert_as_in_cluster(variables, spec, [v.name for v in variables])


def case_unmodified_horovod():
    """Each variable has its own exchange, so a policy that decides for all variables at once is rejected."""
    for spec in (EVERY, policies.SPECS[6]):
        variables = problem.tf_variables()
        g = grace_ext.grace(spec).bind(variables)
        for step in range(problem.STEPS):
            with tf.GradientTape() as tape:
                tape = plain.DistributedGradientTape(tape, compression=g)
                loss = problem.loss_of(variables, hvd.rank(), step)
            for v, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                v.assign(v - problem.LR * gradient)
        assert_as_in_cluster(variables, spec, [v.name for v in variables])
    g = grace_ext.grace("by_size(large=lgreco)")
    raises(UnsupportedError, "decides for all variables at once", lambda: g.bind(problem.tf_variables()))


def case_checkpoint():
    """A saved schedule resumes at the same point, bit for bit."""
    spec = policies.SPECS[7]

    def made():
        variables = problem.keras_variables()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=grace_ext.grace(spec))
        optimizer.build(variables)
        return variables, optimizer

    def train(variables, optimizer, steps):
        for step in steps:
            optimizer.apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step), variables)

    variables, optimizer = made()
    train(variables, optimizer, range(4))
    saved, weights = optimizer.grace_state_dict(), values(variables)
    again, resumed = made()
    for v, w in zip(again, weights, strict=True):
        v.assign(w)
    new = dict(zip([v.path for v in variables], [v.path for v in again], strict=True))
    state = {key: array for key, array in ((f"{k.split('/', 1)[0]}/{new[k.split('/', 1)[1]]}", a) for k, a in saved["state"].items())}
    resumed.load_grace_state_dict({**saved, "state": state})
    train(variables, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    for one, other in zip(values(variables), values(again), strict=True):
        assert one.tobytes() == other.tobytes()


def case_a_pattern_without_a_parameter_is_told_once():
    variables = problem.tf_variables()
    with heard() as told:
        problem.train_by_tape(hvd, variables, grace_ext.grace("by_name({'nothing*': topk + residual}, default=none)"), True)
    assert len(told) == (hvd.rank() == 0) and all("'nothing*' matches no parameter" in sentence for sentence in told), told


def case_auto_on_a_slow_network():
    """In one traced graph, with every wait prolonged as if on a network of 1 MB/s, 'auto' changes from dense to a compressor."""
    at_full_speed = LoopExchange._go_on

    def slowed(self, *arrays):
        time.sleep(self._queue[0].collective.nbytes / 1e6)
        return at_full_speed(self, *arrays)

    candidates = ["topk(ratio=0.01) + residual", "efsignsgd + residual", "powersgd + residual", "fp16"]
    LoopExchange._go_on = slowed
    try:
        for spec in ("auto", f"auto(steps=2, candidates={candidates})"):
            variables = [keras.Variable(np.ones((200, 150), np.float32), name="w"), keras.Variable(np.zeros(150, np.float32), name="b")]
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=grace_ext.grace(spec))
            optimizer.build(variables)
            apply, traces = problem.in_a_graph(optimizer, variables)
            sent = []
            with heard() as said:
                for step in range(6):
                    rng = np.random.default_rng(10 * step + hvd.rank())
                    apply([tf.constant(rng.standard_normal(v.shape), tf.float32) for v in variables])
                    sent.append(optimizer.wire_bytes)
            assert len(traces) == 1 and sent[-1] < sent[0] / 25, (spec, sent)
            told = [sentence for sentence in said if sentence.startswith("auto: ")]
            assert len(told) == (hvd.rank() == 0) and all("gains" in sentence or "against" in sentence for sentence in told), told
            mine = np.concatenate([v.reshape(-1) for v in values(variables)])
            both = hvd.allgather(tf.constant(mine[None])).numpy()
            assert both[0].tobytes() == both[1].tobytes(), spec
    finally:
        LoopExchange._go_on = at_full_speed


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
