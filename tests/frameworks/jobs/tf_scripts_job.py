"""Cases of what other people's Keras and TensorFlow scripts do, on 2 ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import tempfile
import types
import weakref
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import DisagreementError, ParameterError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import raises, run_cases, warnings_of  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
tf.config.threading.set_intra_op_parallelism_threads(1)
X = np.random.default_rng(1).normal(size=(2, 8, 4)).astype(np.float32)  # by rank
Y = np.random.default_rng(2).normal(size=(2, 8, 3)).astype(np.float32)


def make_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(3)])
    for number, variable in enumerate(model.trainable_variables):
        variable.assign(np.random.default_rng(number).normal(size=variable.shape) * 0.5)
    return model


def train(model, optimizer, x, y, steps=6):
    """Trains in a graph; returns the weights."""

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
            scaled = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled, [v.value for v in model.trainable_variables]), model.trainable_variables)

    for _ in range(steps):
        step()
    optimizer.finalize_variable_values(model.trainable_variables)
    return [np.asarray(v.numpy()) for v in model.trainable_variables]


def assert_as_on_joined_batches(make, steps=6):
    """Asserts that a wrapped optimizer on both ranks' batches gives what the plain one gives on the joined batch."""
    expected = train(model := make_model(), make(model), X.reshape(-1, 4), Y.reshape(-1, 3), steps)
    model = make_model()
    wrapped = hvd.DistributedOptimizer(make(model), compression="none")
    got = train(model, wrapped, X[hvd.rank()], Y[hvd.rank()], steps)
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one - other).max() < 2e-5, (type(wrapped).__name__, np.abs(one - other).max())
    return wrapped


class Halved(keras.optimizers.SGD):
    """A subclass with an argument of its own, which its config does not hold."""

    def __init__(self, factor, **options):
        super().__init__(**options)
        self.factor = factor

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.factor, variable, learning_rate)


class Falling(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is not registered and has no config."""

    def __call__(self, step):
        return 0.1 / (1.0 + tf.cast(step, tf.float32))


OPTIMIZERS = ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Adafactor", "Nadam", "Ftrl", "Lion", "Lamb", "Muon")


def case_every_keras_optimizer():
    for name in OPTIMIZERS:
        assert_as_on_joined_batches(lambda model, name=name: getattr(keras.optimizers, name)(learning_rate=0.01))


def case_what_an_instance_carries():
    """Exclusions, schedules of any kind, subclasses, instance attributes, averages, loss scales, accumulation."""

    def excluded(model):
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    def own_method(model):
        optimizer = keras.optimizers.SGD(0.1)
        plain = type(optimizer).update_step
        optimizer.update_step = types.MethodType(lambda self, g, v, lr: plain(self, 3 * g, v, lr), optimizer)
        return optimizer

    makers = (
        excluded,
        own_method,
        lambda m: keras.optimizers.SGD(Falling()),
        lambda m: keras.optimizers.SGD(lambda: 0.05),
        lambda m: Halved(0.5, learning_rate=0.1),
        lambda m: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=2),
        lambda m: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
        lambda m: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3, global_clipnorm=0.5),
        lambda m: keras.optimizers.Adam(0.01, loss_scale_factor=8.0),
        lambda m: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=64.0, dynamic_growth_steps=3),
        lambda m: keras.optimizers.LossScaleOptimizer(Halved(0.5, learning_rate=0.1)),
    )
    for make in makers:
        assert_as_on_joined_batches(make)


def case_accumulated_gradients_are_exchanged_once_per_update():
    make = lambda m: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)  # noqa: E731
    assert assert_as_on_joined_batches(make, steps=9)._grace.dense.driver.step == 3
    both = hvd.DistributedOptimizer(make(None), compression="none", backward_passes_per_step=2)
    raises(Exception, "leave one of them out", lambda: train(make_model(), both, X[0], Y[0]))


def case_what_was_trained_before_is_kept():
    model, optimizer = make_model(), keras.optimizers.Adam(0.01)
    train(model, optimizer, X[0], Y[0], 3)
    wrapped = hvd.DistributedOptimizer(optimizer, compression="none")
    assert wrapped.built and int(wrapped.iterations.numpy()) == 3 and wrapped.variables[2] is optimizer.variables[2]
    wrapped.learning_rate = 0.5  # both are one
    assert float(optimizer.learning_rate.numpy()) == 0.5


def case_copies_and_second_wrappers_are_refused():
    for wrap in (lambda o: hvd.DistributedOptimizer(o, compression="none"), lambda o: hvd.LocalSGD(o, every=2)):
        plain = keras.optimizers.SGD(0.1)
        wrapped = wrap(plain)
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            raises(UnsupportedError, "copy the plain optimizer", lambda make=make, wrapped=wrapped: make(wrapped))
        for again in (wrapped, plain):
            raises(UnsupportedError, "wrapped before", lambda again=again: hvd.DistributedOptimizer(again, compression="none"))
            raises(UnsupportedError, "wrapped before", lambda again=again: hvd.LocalSGD(again, every=2))
            scaled = keras.optimizers.LossScaleOptimizer(again)
            raises(UnsupportedError, "wrapped before", lambda scaled=scaled: hvd.DistributedOptimizer(scaled, compression="none"))


def case_an_optimizer_that_is_not_wrapped_is_told():
    """For example because the model was compiled from a config, which names the plain optimizer."""
    model = make_model()
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=TOPK), "mse", jit_compile=False)
    again = keras.models.clone_model(model)
    again.compile_from_config(model.get_compile_config())
    again.jit_compile = False
    fit = lambda m, *callbacks: m.fit(X[0], Y[0], verbose=0, callbacks=list(callbacks))  # noqa: E731
    told = warnings_of(lambda: fit(again, hvd.callbacks.BroadcastGlobalVariablesCallback(0)))
    assert len(told) == (hvd.rank() == 0), told
    assert all("hvd.load_model" in str(w.message) for w in told)
    assert not warnings_of(lambda: fit(model, hvd.callbacks.BroadcastGlobalVariablesCallback(0)))
    raises(UnsupportedError, "plain SGD", lambda: fit(again, hvd.callbacks.CompressionMetricsCallback()))
    raises(UnsupportedError, "check_agreement takes", lambda: fit(again, hvd.callbacks.AgreementCallback()))


def case_load_model_wraps_again():
    import grace_ext.frameworks.tensorflow.keras as same

    model = make_model()
    model.compile(hvd.DistributedOptimizer(Halved(0.5, learning_rate=0.25, momentum=0.9), compression=TOPK), "mse", jit_compile=False)
    model.fit(X[hvd.rank()], Y[hvd.rank()], verbose=0)
    model = make_model()
    plain = keras.optimizers.SGD(0.25, momentum=0.9)
    model.compile(hvd.DistributedOptimizer(plain, compression=TOPK), "mse", jit_compile=False)
    model.fit(X[hvd.rank()], Y[hvd.rank()], verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        loaded = same.load_model(Path(folder) / "model.keras", compression=TOPK)
    assert type(loaded.optimizer).__mro__[1].__name__ == "_Distributed" and int(loaded.optimizer.iterations.numpy()) == 1
    loaded.jit_compile = False
    loaded.fit(X[hvd.rank()], Y[hvd.rank()], verbose=0)
    assert loaded.optimizer.wire_bytes > 0
    hvd.check_agreement(loaded.optimizer)


def case_seeds_stay_the_ranks_own():
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression="none"), "mse", jit_compile=False)
    model.fit(X[0], Y[0], verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    dropped = model.layers[0](np.ones((1, 4000), np.float32), training=True) == 0
    everyone = hvd.allgather(tf.cast(dropped, tf.float32)).numpy()
    assert 0.3 < np.abs(everyone[0] - everyone[1]).mean() < 0.7
    hvd.check_agreement(model.optimizer, model)
    state = hvd.elastic.TensorFlowKerasState(model)
    state.sync()
    seeds = [v for v in model.variables if "seed" in v.path][0].numpy()
    assert len({tuple(row) for row in hvd.allgather(tf.constant(seeds[None].view(np.int32))).numpy()}) == 2


def case_models_with_other_names_on_the_ranks():
    """Rank 1 has built one model more, so Keras gives its layers other names."""
    keras.utils.clear_session()
    if hvd.rank() == 1:
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    hvd.broadcast_variables(model.variables, root_rank=0)  # by place
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression="none")
    # TensorFlow wraps errors of traced code in a class of its own.
    raises(Exception, "keras.utils.clear_session()", lambda: train(model, optimizer, X[0], Y[0]))

    tables = [keras.Variable(np.ones((4, 2), np.float32), name=f"table_{hvd.rank()}")]
    rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]), tf.constant([4, 2]))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression="none")
    raises(DisagreementError, "keras.utils.clear_session()", lambda: optimizer.apply([rows], tables))
    raises(DisagreementError, "rank 1 broadcasts 2 variables, rank 0 1", lambda: hvd.broadcast_variables(tables * (1 + hvd.rank()), 0))
    keras.utils.clear_session()


def case_a_gradient_that_is_sparse_on_one_rank():
    table = keras.Variable(np.ones((4, 2), np.float32), name="table")
    rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([0]), tf.constant([4, 2]))
    dense = tf.ones((4, 2))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression="none")
    raises(DisagreementError, "table", lambda: optimizer.apply([rows if hvd.rank() else dense], [table]))
    other = keras.Variable(np.ones(3, np.float32), name="other")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), compression="none")
    raises(DisagreementError, "table", lambda: optimizer.apply([rows if hvd.rank() else None, tf.ones(3)], [table, other]))


def case_sparse_rows_are_added_up():
    """Rows of one index are added up before they are sent, and after the gather."""
    rank = hvd.rank()
    rows = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]) * (1 + rank), tf.constant([3, 0, 3]), tf.constant([5, 1]))
    table = keras.Variable(np.zeros((5, 1), np.float32), name="table")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression="none")
    optimizer.apply([rows], [table])
    assert table.numpy().reshape(-1).tolist() == [-3.0, 0.0, 0.0, -7.5, 0.0]


def case_sparse_local_gradients():
    """A local variable's gradient is divided by the number of ranks, also if it is sparse; with scale_local_gradients=False it is not."""
    rows = tf.IndexedSlices(tf.constant([[3.0], [2.0]]) * (1 + hvd.rank()), tf.constant([3, 0]), tf.constant([5, 1]))
    expected = np.array([[-2.0], [0], [0], [-3.0], [0]], np.float32) * (1 + hvd.rank())
    for scale in (True, False):
        own, shared = keras.Variable(np.zeros((5, 1), np.float32)), keras.Variable(np.zeros(3, np.float32))
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression="none", scale_local_gradients=scale)
        optimizer.register_local_var(own)
        optimizer.apply([rows, tf.ones(3)], [own, shared])
        assert (own.numpy() == expected / (2 if scale else 1)).all(), own.numpy()

        table = tf.Variable(tf.zeros((5, 1)))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, [3, 0]) * -rows.values)
        tape = hvd.DistributedGradientTape(tape, compression=TOPK, scale_local_gradients=scale)
        tape.register_local_source(table)
        gradient = tape.gradient(loss, [table])[0]
        assert isinstance(gradient, tf.IndexedSlices)
        assert (tf.convert_to_tensor(gradient).numpy() == expected / (2 if scale else 1)).all()


def case_not_finite_beside_the_dense_gradients():
    """Under a loss scale, an Inf in a sparse (unique or repeated rows) or a local gradient of one rank skips the step on all ranks, with
    no change of weights or memory, as an Inf in a dense gradient does."""

    def run(where):
        variables = [keras.Variable(np.ones((6, 4), np.float32), name=n) for n in ("dense", "table", "own")]
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
        optimizer = hvd.DistributedOptimizer(scaled, compression=TOPK)
        optimizer.register_local_var(variables[2])
        optimizer.build(variables)
        apply = tf.function(lambda gradients: optimizer.apply(gradients, variables))
        states = []
        for step in range(4):
            bad = step == 2 and hvd.rank() == 1
            rng = np.random.default_rng([step, hvd.rank()])
            dense, values, own = (rng.normal(size=(6, 4)).astype(np.float32) * 8 for _ in range(3))
            indices = np.array([0, 2, 2, 5, 1, 1] if where == "repeated rows" else [0, 2, 4, 5, 1, 3])
            if bad and where == "dense":
                dense[0, 0] = np.inf
            if bad and where == "rows":
                values[1, 1] = np.nan
            if bad and where == "repeated rows":
                values[1], values[2] = np.inf, -np.inf
            if bad and where == "own":
                own[3] = np.inf
            apply([tf.constant(dense), tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([6, 4])), tf.constant(own)])
            memory = optimizer.grace_state_dict()["state"]
            weights = [v.numpy().copy() for v in variables]
            states.append((weights, {k: np.array(v) for k, v in memory.items()}, float(optimizer.dynamic_scale.numpy())))
        return states

    for where in ("dense", "rows", "repeated rows", "own"):
        states = run(where)
        (before, memory, scale), (after, memory_after, scale_after) = states[1], states[2]
        assert all((a == b).all() for a, b in zip(before, after, strict=True)), where
        assert scale_after == scale / 2, (where, scale, scale_after)
        assert all((memory_after[k] == v).all() for k, v in memory.items()), where
        assert any(np.abs(a - b).max() > 0 for a, b in zip(states[3][0], after, strict=True)), where


def case_metrics_are_paired_by_name():
    callback = hvd.callbacks.MetricAverageCallback()
    rank = hvd.rank()
    logs = {"loss": 1.0 + rank, "b": np.array([1.0, 3.0]) * rank, **({"only": 5.0} if rank else {"another": 7.0})}
    callback.on_epoch_end(0, logs)
    assert logs["loss"] == 1.5 and logs["b"].tolist() == [0.5, 1.5], logs
    assert {k: v for k, v in logs.items() if k not in ("loss", "b")} == ({"only": 5.0} if rank else {"another": 7.0})
    raises(ParameterError, "one shape", lambda: callback.on_epoch_end(1, {"loss": np.ones(1 + rank)}))


def case_learning_rates_are_horovods():
    def rates(callback, epochs=4):
        model = make_model()
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
        seen = []
        note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(float(model.optimizer.learning_rate)))
        model.fit(X[0], Y[0], batch_size=4, epochs=epochs, verbose=0, callbacks=[callback, note])
        return seen

    assert np.allclose(rates(hvd.callbacks.LearningRateScheduleCallback(0.8, 0.5, start_epoch=1)), [1, 1, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2])
    warmed = rates(hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=2), 3)
    assert np.allclose(warmed, [0.5, 0.6, 0.7, 0.8, 0.8, 0.8]), warmed
    told = warnings_of(lambda: hvd.callbacks.LearningRateScheduleCallback(0.1, 0.5, momentum_correction=True))
    assert len(told) == (hvd.rank() == 0)


def case_variables_of_every_type_are_broadcast():
    numbers = {"bfloat16": 1.5, "uint16": 7, "uint32": 2**31 + 1, "uint64": 2**40, "int16": -3, "float32": 0.5}
    values = {**numbers, "string": "rank", "bool": True}
    for kind, value in values.items():
        root = tf.constant(value, kind)
        variable = tf.Variable(root if hvd.rank() == 0 else tf.zeros_like(root))
        hvd.broadcast_variables([variable], root_rank=0)
        assert variable.numpy() == root.numpy(), kind


def case_a_persistent_tape_with_two_losses():
    """Each loss has a memory of its own, so both trainings are as if they had tapes of their own."""

    def trained(persistent, in_graph):
        variables = [tf.Variable(np.linspace(0.1, 1, 30).astype(np.float32) * (1 + i)) for i in range(2)]
        g, rank = grace_ext.grace(TOPK), hvd.rank()
        compressions = [grace_ext.grace("topk(ratio=0.1, index='bitmap') + residual"), grace_ext.grace(TOPK)]  # of the same values

        def step():
            with tf.GradientTape(persistent=True) as tape:
                one = tf.reduce_sum(variables[0] ** 2 * variables[1]) * (1 + rank)
                two = tf.reduce_sum(tf.sin(variables[0]) + variables[1] ** 3) * (2 - rank)
            if persistent:
                wrapped = hvd.DistributedGradientTape(tape, compression=g)
                gradients = [wrapped.gradient(loss, variables) for loss in (one, two)]
            else:
                tapes = [hvd.DistributedGradientTape(tape, compression=c) for c in compressions]
                gradients = [t.gradient(loss, variables) for t, loss in zip(tapes, (one, two), strict=True)]
            for variable, a, b in zip(variables, *gradients, strict=True):
                variable.assign_sub(0.01 * (a + 0.5 * b))

        run = tf.function(step) if in_graph else step
        for _ in range(4):
            run()
        return [v.numpy() for v in variables]

    for in_graph in (False, True):
        for one, other in zip(trained(True, in_graph), trained(False, in_graph), strict=True):
            assert np.array_equal(one, other)


def case_arguments_of_the_tape():
    a, b = tf.Variable([1.0]), tf.Variable([2.0])
    watched = tf.constant([3.0])

    def tape():
        with tf.GradientTape(persistent=True) as plain:
            plain.watch(watched)
            loss = tf.reduce_sum(a * watched)
        return hvd.DistributedGradientTape(plain, compression="none"), loss

    wrapped, loss = tape()
    zero = tf.UnconnectedGradients.ZERO
    assert [g.numpy().tolist() for g in wrapped.gradient(loss, [a, b], unconnected_gradients=zero)] == [[3.0], [0.0]]
    raises(UnsupportedError, "watched", lambda: wrapped.gradient(loss, [a, watched]))
    raises(UnsupportedError, "plain tf.GradientTape", lambda: wrapped.jacobian(loss, a))
    raises(UnsupportedError, "plain tf.GradientTape", lambda: wrapped.batch_jacobian(loss, a))
    raises(UnsupportedError, "GroupNormalization", lambda: hvd.SyncBatchNormalization())


def case_a_compiled_function_is_refused():
    variable = tf.Variable([1.0])

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable**2)
        return hvd.DistributedGradientTape(tape, compression="none").gradient(loss, [variable])

    raises(Exception, "leave jit_compile out", step)  # TensorFlow wraps errors of traced code in a class of its own


def case_models_are_given_back():
    """A tape's exchange and memory are dropped with its variables."""

    def use():
        variable = tf.Variable(tf.ones(1000))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable**2)
        wrapped = hvd.DistributedGradientTape(tape, compression=TOPK)
        wrapped.gradient(loss, [variable])
        return weakref.ref(variable), weakref.ref(wrapped.memory([variable]))

    for _ in range(3):
        references = use()
        gc.collect()
        assert all(reference() is None for reference in references)


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
