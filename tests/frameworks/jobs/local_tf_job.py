"""Cases of LocalSGD for Keras 3 on 2 ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import DisagreementError, IncompatiblePartsError, UnsupportedError
from grace_ext.local import LocalSGDCluster

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tf_training as problem  # noqa: E402
from cases import raises, run_cases  # noqa: E402

QSPARSE = "topk(ratio=0.1) > qsgd(bits=4) + residual"
LEARNING = f"accordion(high=lgreco(base=topk(ratio=0.1) + residual, every=2, window=1), low={QSPARSE}, interval=2)"
tf.config.threading.set_intra_op_parallelism_threads(1)


def values(variables):
    return [np.asarray(v.numpy()) for v in variables]


def same_on_all_ranks(arrays):
    return len(set(hvd.allgather_object(b"".join(np.asarray(a).tobytes() for a in arrays)))) == 1


def sgd(spec, **options):
    return hvd.LocalSGD(keras.optimizers.SGD(problem.LR), spec, **options)


def trained(spec, steps, graph, variables=None, optimizer=None, **options):
    variables = variables or problem.keras_variables()
    optimizer = optimizer or sgd(spec, **options)
    optimizer.build(variables)
    apply = tf.function(lambda gradients: optimizer.apply(gradients, variables)) if graph else lambda g: optimizer.apply(g, variables)
    for step in steps:
        apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step))
    return variables, optimizer


def in_cluster(spec, steps, names, **options):
    cluster, models = LocalSGDCluster(spec, 2, **options), [problem.initial(), problem.initial()]
    as_dict = lambda arrays: {n: np.asarray(a) for n, a in zip(names, arrays, strict=True)}  # noqa: E731
    cluster.start([as_dict(m) for m in models])
    for step in steps:
        own = [as_dict([g.numpy() for g in problem.gradients_of([tf.constant(w) for w in m], r, step)]) for r, m in enumerate(models)]
        given = cluster.gradients(own, lr=problem.LR)
        moved = [{n: w - np.float32(problem.LR) * g[n] for n, w in as_dict(m).items()} for m, g in zip(models, given, strict=True)]
        models = [[np.asarray(m[n]) for n in names] for m in cluster.step(moved)]
    return models[hvd.rank()]


def case_the_clusters_models():
    for graph in (False, True):
        for spec, options in (
            ("none", {"every": 3}),
            ("none", {"every": 1}),
            (QSPARSE, {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}),
            (QSPARSE, {"schedule": hvd.post_local(start=3, every=2)}),
            ("topk(ratio=0.1) + cser(reset_period=4)", {}),
            (f"by_size(min_elements=20, large={QSPARSE})", {"every": 3}),
            (LEARNING, {"every": 1}),
        ):
            variables, optimizer = trained(spec, range(8), graph, **options)
            expected = in_cluster(spec, range(8), [v.path for v in variables], **options)
            for got, want in zip(values(variables), expected, strict=True):
                # Keras's optimizer rounds its own step once more or once less; the exchange is the same.
                assert np.abs(got - want).max() <= 2e-6, (spec, options, np.abs(got - want).max())
            optimizer.sync()
            assert same_on_all_ranks(values(variables)), (spec, options)


def case_every_step_without_loss_is_data_parallel_training():
    plain, both = problem.keras_variables(), []
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR, momentum=0.9), compression=grace_ext.grace("none"))
    both.append(trained("", range(6), True, plain, optimizer)[0])
    optimizer = hvd.LocalSGD(keras.optimizers.SGD(problem.LR, momentum=0.9), every=1)
    both.append(trained("", range(6), True, problem.keras_variables(), optimizer)[0])
    for one, other in zip(*map(values, both), strict=True):
        assert one.tobytes() == other.tobytes()


def case_bytes_are_sent_when_it_is_due():
    for graph in (False, True):
        variables, optimizer, sent = problem.keras_variables(), sgd(QSPARSE, every=3), []
        for step in range(6):
            trained(QSPARSE, range(step, step + 1), graph, variables, optimizer)
            sent.append(optimizer.wire_bytes)
        assert [n > 0 for n in sent] == [False, False, True] * 2, sent


def tiny_model():
    keras.utils.set_random_seed(1 + hvd.rank())  # ranks start with different models; the callback must make them equal
    layers = keras.layers
    return keras.Sequential([layers.Input((6,)), layers.Dense(16), layers.BatchNormalization(), layers.ReLU(), layers.Dense(3)])


def fit(model, optimizer, callbacks=(), **options):
    generator = np.random.default_rng(hvd.rank())
    x = generator.standard_normal((96, 6)).astype(np.float32) + hvd.rank()
    y = (x[:, :3].argmax(axis=1) + 0).astype(np.int64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], **options)
    return model.fit(x, y, batch_size=16, epochs=4, verbose=0, shuffle=False, callbacks=list(callbacks))


def case_fit():
    """`fit` makes 24 steps, six per epoch, and synchronizes after every fifth."""
    for asynchronous in (False, True):
        model = tiny_model()
        optimizer = hvd.LocalSGD(keras.optimizers.SGD(0.1, momentum=0.9), QSPARSE, every=5, asynchronous=asynchronous)
        history = fit(model, optimizer, [hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
        assert history.history["loss"][-1] < 0.8 * history.history["loss"][0], history.history["loss"]
        weights = [v.numpy() for v in model.trainable_variables]
        assert not same_on_all_ranks(weights)
        model.optimizer.sync()
        assert same_on_all_ranks([v.numpy() for v in model.trainable_variables])
        assert not same_on_all_ranks([v.numpy() for v in model.non_trainable_variables])  # BatchNorm's statistics are each rank's own
        assert model.optimizer.grace_state_dict()["model"]["step"] == 24


def case_fit_with_a_policy():
    for spec, asynchronous in ((LEARNING, False), (f"warmup(steps=1, then={QSPARSE})", False), (f"warmup(steps=1, then={QSPARSE})", True)):
        model = tiny_model()
        optimizer = hvd.LocalSGD(keras.optimizers.SGD(0.1, momentum=0.9), spec, every=3, asynchronous=asynchronous)
        history = fit(model, optimizer, [hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
        assert history.history["loss"][-1] < 0.8 * history.history["loss"][0], history.history["loss"]
        model.optimizer.sync()
        assert same_on_all_ranks([v.numpy() for v in model.trainable_variables])


def case_fit_of_models_that_differ():
    raises(DisagreementError, "BroadcastGlobalVariablesCallback", lambda: fit(tiny_model(), sgd("none")))


def case_resume():
    straight, _ = trained(QSPARSE, range(9), True, every=3, outer_momentum=0.5)
    first, one = trained(QSPARSE, range(4), True, every=3, outer_momentum=0.5)
    two = sgd(QSPARSE, every=3, outer_momentum=0.5)
    two.load_grace_state_dict({**one.grace_state_dict()})
    trained(QSPARSE, range(4, 9), True, first, two)
    for a, b in zip(values(straight), values(first), strict=True):
        assert a.tobytes() == b.tobytes()


def case_refusals():
    raises(UnsupportedError, "jit_compile", lambda: fit(tiny_model(), sgd(QSPARSE), jit_compile=True))
    legacy = tf.compat.v1.train.GradientDescentOptimizer(0.1)
    raises(UnsupportedError, "Keras 3", lambda: hvd.LocalSGD(legacy))
    raises(UnsupportedError, "use_ema=True", lambda: hvd.LocalSGD(keras.optimizers.SGD(0.1, use_ema=True)))
    cser = "topk(ratio=0.1) + cser(reset_period=4)"
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    raises(UnsupportedError, "at one loss scale", lambda: hvd.LocalSGD(scaled, cser))
    for more in ({"weight_decay": 0.01}, {"clipnorm": 0.3}, {"gradient_accumulation_steps": 3}):
        raises(IncompatiblePartsError, next(iter(more)), lambda more=more: hvd.LocalSGD(keras.optimizers.SGD(0.1, **more), cser))


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
