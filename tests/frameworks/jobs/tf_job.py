"""Cases of grace_ext.frameworks.tensorflow on 2 ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import DisagreementError, GraceError, NamesError, UnsupportedError
from grace_ext.metrics.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tf_training as problem  # noqa: E402
from cases import raises, run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
tf.config.threading.set_intra_op_parallelism_threads(1)


def values(variables):
    return [np.asarray(v.numpy()) for v in variables]


def assert_close(got, expected, spec):
    for one, other in zip(got, expected, strict=True):
        # Optimizers may round their own update once more or once less; the exchange gives the same bits.
        assert np.abs(one - other).max() <= 1e-6, (spec, np.abs(one - other).max())


def assert_ranks_equal(arrays):
    mine = tf.constant(np.concatenate([a.reshape(-1) for a in arrays]))
    everyone = hvd.allgather(mine[None]).numpy()
    assert everyone[0].tobytes() == everyone[1].tobytes()


def sgd(g, **options):
    return hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=g, **options)


def applied_in_a_graph(optimizer, variables):
    optimizer.build(variables)
    return tf.function(lambda gradients: optimizer.apply(gradients, variables))


def case_keras_optimizer_every_spec():
    for spec in (*problem.SPECS, *problem.WITH_AN_OPTIMIZER):
        variables, optimizer = problem.keras_variables(), sgd(grace_ext.grace(spec))
        apply = applied_in_a_graph(optimizer, variables)
        for step in range(problem.STEPS):
            apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step))
        assert_close(values(variables), problem.train_in_cluster(spec, 2, [v.path for v in variables]).values(), spec)
        assert_ranks_equal(values(variables))


def case_tape_over_tf_variables():
    for graph in (False, True):
        for spec in (TOPK, "powersgd(rank=2) + residual", "none"):
            variables = problem.tf_variables()
            problem.train_by_tape(hvd, variables, grace_ext.grace(spec), graph)
            assert_close(values(variables), problem.train_in_cluster(spec, 2, [v.name for v in variables]).values(), spec)
            assert_ranks_equal(values(variables))


def case_tape_over_keras_variables():
    for graph in (False, True):
        variables = problem.keras_variables()
        problem.train_by_tape(hvd, variables, grace_ext.grace(TOPK), graph)
        assert_close(values(variables), problem.train_in_cluster(TOPK, 2, [v.path for v in variables]).values(), TOPK)


def case_compression_made_anew_is_refused():
    variables = problem.tf_variables()
    problem.train_by_tape(hvd, variables, grace_ext.grace(TOPK), False, range(1))
    raises(UnsupportedError, "same object", lambda: problem.train_by_tape(hvd, variables, grace_ext.grace(TOPK), False, range(1)))


def tiny_model():
    keras.utils.set_random_seed(1 + hvd.rank())  # ranks start with different models; the callback must make them equal
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(3)])
    return model


def tiny_data():
    generator = np.random.default_rng(hvd.rank())
    x = generator.standard_normal((96, 6)).astype(np.float32)
    return x, (x[:, :3].argmax(axis=1) + 0).astype(np.int64)


def fit(model, optimizer, epochs=2, callbacks=(), **compile_options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], **compile_options)
    return model.fit(*tiny_data(), batch_size=16, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks))


def case_fit():
    for eager in (False, True):
        for make in (lambda: keras.optimizers.SGD(0.1, momentum=0.9), lambda: keras.optimizers.Adam(0.01)):
            model = tiny_model()
            optimizer = hvd.DistributedOptimizer(make(), compression=grace_ext.grace(TOPK))
            callbacks = [
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                hvd.callbacks.MetricAverageCallback(),
                hvd.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=1),
                hvd.callbacks.CompressionMetricsCallback(),
            ]
            history = fit(model, optimizer, 3, callbacks, run_eagerly=eager).history
            assert_ranks_equal(model.get_weights())
            assert_ranks_equal([np.array(history["loss"]), np.array(history["accuracy"])])
            assert history["loss"][-1] < history["loss"][0]
            assert history["compression_ratio"][-1] > 2 and history["wire_bytes"][-1] > 0


def case_metrics_of_fit():
    """The callback turns metrics on; logs, JSON lines and TensorBoard have them; weights are as without metrics."""
    with tempfile.TemporaryDirectory() as folder:
        weights = []
        for options in ({}, {"every": 4, "jsonl": f"{folder}/lines", "tensorboard": folder}):
            model = tiny_model()
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=grace_ext.grace(TOPK))
            ours = hvd.callbacks.CompressionMetricsCallback(**options)
            history = fit(model, optimizer, 2, [hvd.callbacks.BroadcastGlobalVariablesCallback(0), ours]).history
            weights.append(model.get_weights())
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*weights, strict=True))
        assert 0 < history["relative_error"][-1] < 1 and history["residual_norm"][-1] > 0 and history["encode_seconds"][-1] > 0
        report = optimizer.metrics()
        assert report["step"] == 11 and report["measured_at"] == 8 and report["total"]["bytes"] == optimizer.wire_bytes
        if hvd.rank() == 0:
            assert [json.loads(line)["step"] for line in Path(folder, "lines").read_text().splitlines()] == [0, 4, 8]
            (file,) = Path(folder).glob("events*")
            tags = [(e.step, v.tag) for e in tf.compat.v1.train.summary_iterator(str(file)) for v in e.summary.value]
            assert [step for step, tag in tags if tag == "grace/total/relative_error"] == [0, 4, 8]


def gradients_with(metrics, g, variables):
    def one_step():
        with tf.GradientTape() as tape:
            tape = hvd.DistributedGradientTape(tape, compression=g, metrics=metrics)
            loss = problem.loss_of(variables, hvd.rank(), 0)
        return tape.gradient(loss, variables)

    return one_step


def case_metrics_of_a_tape():
    """One Metrics object serves the tapes of all steps, in eager code and in a graph that is traced once."""
    for graph in (False, True):
        metrics = Metrics(every=2)
        run = gradients_with(metrics, grace_ext.grace(TOPK), problem.tf_variables())
        run = tf.function(run) if graph else run
        for _ in range(4):
            run()
        report = metrics.report()
        assert report["step"] == 3 and report["measured_at"] == 2 and 0 < report["total"]["relative_error"] < 1


def case_plain_horovod_drifts_apart_under_keras_3():
    import horovod.tensorflow.keras as plain

    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit(model, plain.DistributedOptimizer(keras.optimizers.SGD(0.1)), callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
        except (AttributeError, ValueError, TypeError):
            return  # this Horovod raises instead of silently not reducing
    everyone = hvd.allgather(tf.constant(model.get_weights()[0])[None]).numpy()
    assert np.abs(everyone[0] - everyone[1]).max() > 1e-3


def case_backward_passes():
    for average in (False, True):
        variables = problem.keras_variables()
        optimizer = sgd(grace_ext.grace(TOPK), backward_passes_per_step=2, average_aggregated_gradients=average)
        apply = applied_in_a_graph(optimizer, variables)
        cluster, weights = grace_ext.LocalCluster(grace_ext.grace(TOPK), 2), problem.initial()
        for step in range(0, 8, 2):
            for i in range(2):
                apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step + i))
            sums = []
            for rank in range(2):
                pair = [problem.gradients_of([tf.constant(w) for w in weights], rank, step + i) for i in range(2)]
                total = [(a + b).numpy() / (2 if average else 1) for a, b in zip(*pair, strict=True)]
                sums.append(dict(zip([v.path for v in variables], total, strict=True)))
            mean = cluster.step(sums, lr=problem.LR)
            weights = [w - np.float32(problem.LR) * mean[v.path] for v, w in zip(variables, weights, strict=True)]
        assert_close(values(variables), weights, TOPK)
        assert int(optimizer.iterations.numpy()) == 4


def embedding_gradients(table):
    rows = tf.constant([1, 5, 5, 7 + hvd.rank()])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(tf.gather(table, rows)))
    gradient = tape.gradient(loss, table)
    assert isinstance(gradient, tf.IndexedSlices)
    return gradient


def case_indexed_slices():
    start = np.arange(80, dtype=np.float32).reshape(20, 4) / 40
    ends = []
    for g, sparse_as_dense in ((TOPK.replace("0.1", "1.0"), True), (TOPK, False), ("none", True)):
        table = keras.Variable(start, name="table")
        optimizer = sgd(grace_ext.grace(g), sparse_as_dense=sparse_as_dense)
        optimizer.build([table])
        for _ in range(3):
            optimizer.apply([embedding_gradients(table.value)], [table])
        ends.append(np.asarray(table.numpy()))
    assert np.allclose(ends[0], ends[2], atol=1e-6) and np.allclose(ends[1], ends[2], atol=1e-6)


def case_saved_models_load_without_us():
    model = tiny_model()
    hvd.broadcast_variables(model.variables, root_rank=0)
    fit(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), compression=grace_ext.grace(TOPK)))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        code = (
            "import sys, keras; m = keras.models.load_model(sys.argv[1]); "
            "assert type(m.optimizer) is keras.optimizers.SGD, type(m.optimizer); assert float(m.optimizer.momentum) == 0.9; "
            "assert not {'grace_ext', 'horovod'} & set(sys.modules); print('LOADED')"
        )
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD")}
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=clean)
        assert "LOADED" in done.stdout, done.stderr[-2000:]


def case_xla():
    raises(UnsupportedError, "jit_compile", lambda: fit(tiny_model(), sgd(TOPK), jit_compile=True))
    model = tiny_model()
    model._resolve_auto_jit_compile = lambda: True  # as Keras answers with a GPU
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, sgd(TOPK), callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert any("jit_compile='auto'" in str(w.message) for w in caught) == (hvd.rank() == 0)
    assert model.jit_compile is False


def case_not_finite():
    variables, optimizer = problem.keras_variables(), sgd(grace_ext.grace(TOPK))
    optimizer.build(variables)
    for step in range(3):
        gradients = problem.gradients_of([v.value for v in variables], hvd.rank(), step)
        if step == 1:
            before = optimizer.grace_state_dict()
            weights = values(variables)
            gradients[0] = gradients[0] * (np.inf if hvd.rank() == 0 else 1.0)
        optimizer.apply(gradients, variables)
        if step == 1:
            after = optimizer.grace_state_dict()
            assert after["step"] == before["step"] + 1
            assert all(np.array_equal(after["state"][k], before["state"][k]) for k in before["state"])
            assert all(np.isnan(v).any() for v in values(variables))
            for v, w in zip(variables, weights, strict=True):
                v.assign(w)
    assert all(np.isfinite(v).all() for v in values(variables))


def case_resume():
    def steps(variables, optimizer, which):
        for step in which:
            optimizer.apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step), variables)

    straight, one = problem.keras_variables(), sgd(grace_ext.grace(TOPK))
    steps(straight, one, range(5))
    first, two = problem.keras_variables(), sgd(grace_ext.grace(TOPK))
    steps(first, two, range(3))
    three = sgd(grace_ext.grace(TOPK))
    three.load_grace_state_dict({**two.grace_state_dict()})
    steps(first, three, range(3, 5))
    for a, b in zip(values(straight), values(first), strict=True):
        assert a.tobytes() == b.tobytes()


def case_refusals():
    legacy = tf.compat.v1.train.GradientDescentOptimizer(0.1)
    raises(UnsupportedError, "Keras 3", lambda: hvd.DistributedOptimizer(legacy, compression=TOPK))
    raises(UnsupportedError, "Adasum", lambda: sgd(TOPK, op=hvd.Adasum))
    variables, optimizer = problem.keras_variables(), sgd(TOPK)
    gradients = problem.gradients_of([v.value for v in variables], hvd.rank(), 0)
    optimizer.apply(gradients, variables)
    raises(NamesError, "scalar", lambda: optimizer.apply([*gradients[:3], None], variables))


def case_agreement():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(sgd(TOPK), "mse", jit_compile=False)
    hvd.broadcast_variables(model.variables, root_rank=0)
    raises(GraceError, "after the first step", lambda: hvd.check_agreement(model.optimizer))
    x, y = np.ones((16, 4), np.float32) * (hvd.rank() + 1), np.zeros((16, 2), np.float32)
    model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[hvd.callbacks.AgreementCallback(every=2)])
    hvd.check_agreement(model.optimizer, model)
    if hvd.rank() == 1:
        model.layers[0].bias.assign_add([0.0, 1e-6])
    raises(DisagreementError, "rank 1: 1 of 2 parameters differ: sequential", lambda: hvd.check_agreement(model.optimizer, model))
    fit = lambda: model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[hvd.callbacks.AgreementCallback(every=2)])  # noqa: E731
    raises(DisagreementError, "rank 1", fit)


def case_variables_that_start_differently_are_told():
    def train(g, steps, in_graph, broadcast_at, **options):
        variables = [tf.Variable([1.0 + hvd.rank(), 2.0]), tf.Variable([[3.0]])]

        def step():
            with tf.GradientTape() as plain:
                loss = tf.reduce_sum(variables[0] ** 2) + tf.reduce_sum(variables[1] ** 2)
            gradients = hvd.DistributedGradientTape(plain, compression=g, **options).gradient(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(0.1 * gradient)

        step = tf.function(step) if in_graph else step
        for number in range(steps):
            if number == broadcast_at:
                hvd.broadcast_variables(variables, root_rank=0)
            step()
        return values(variables)

    for in_graph in (False, True):
        for spec in ("none", "none @ hierarchical"):  # of the second, collectives are found while it runs
            g = grace_ext.grace(spec)
            raises((tf.errors.OpError, DisagreementError), "BroadcastGlobalVariablesCallback", lambda: train(g, 2, in_graph, -1))  # noqa: B023
            for broadcast_at in (0, 1):  # Horovod's scripts broadcast after the first batch
                assert_ranks_equal(train(g, 4, in_graph, broadcast_at))
        apart = train(grace_ext.grace("none"), 3, in_graph, -1, check_start=False)[0]
        everyone = hvd.allgather(tf.constant(apart[None, 0])).numpy()
        assert everyone[1] - everyone[0] == 1, everyone  # they move alike, and stay as far apart as they started


def case_a_keras_model_that_starts_differently_is_told():
    def fit(callbacks, **options):
        keras.utils.set_random_seed(hvd.rank())
        model = keras.Sequential([keras.layers.Dense(3)])
        model.compile(sgd("none", **options), "mse", jit_compile=False)
        model.fit(np.ones((16, 4)), np.ones((16, 3)), batch_size=4, verbose=0, callbacks=callbacks)
        return values(model.trainable_variables)

    raises(tf.errors.OpError, "rank 1: 1 of 2 parameters differ: sequential", lambda: fit([]))
    assert_ranks_equal(fit([hvd.callbacks.BroadcastGlobalVariablesCallback(0)]))
    fit([], check_start=False)


def case_disagreement():
    variables = problem.keras_variables()
    optimizer = sgd([TOPK, "qsgd"][hvd.rank()])
    gradients = problem.gradients_of([v.value for v in variables], hvd.rank(), 0)
    raises(DisagreementError, "rank 1 uses 'qsgd @ allgather'", lambda: optimizer.apply(gradients, variables))
    optimizer, few = sgd(TOPK), 4 - hvd.rank()
    raises(DisagreementError, "scalar", lambda: optimizer.apply(gradients[:few], variables[:few]))


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
