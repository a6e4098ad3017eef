"""Cases of privacy in TensorFlow's optimizer and tape, on any number of ranks. Prints 'CASE name ok' for each case."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import GraceError, ParameterError, SpecSyntaxError, UnsupportedError
from grace_ext.frameworks.tensorflow.graph import HorovodTransport
from grace_ext.privacy.mechanism import Mechanism

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tf_training as problem  # noqa: E402
from cases import raises, run_cases  # noqa: E402
from privacy import check_nothing_raw_is_sent, same_noise  # noqa: E402

CLIP, BATCH, TOPK = 0.5, 16, "topk(ratio=0.1) + residual"
RANKS = hvd.Privacy(clip=CLIP, noise_multiplier=0)
EXAMPLES = hvd.Privacy(clip=CLIP, noise_multiplier=0, unit="example", sample_rate=0.1, batch=BATCH)
NOISY = hvd.Privacy(clip=1, noise_multiplier=2, unit="example", sample_rate=0.1, batch=BATCH)


def wrap(privacy=None, g="none", lr=1.0, **options):
    return hvd.DistributedOptimizer(keras.optimizers.SGD(lr), compression=g, privacy=privacy, **options)


def values(variables):
    return [np.asarray(v.numpy()).astype(np.float64) for v in variables]


def moved(step, variables):
    """Returns what a step of rate 1 has subtracted from the variables: the aggregate."""
    before = values(variables)
    step()
    return [one - other for one, other in zip(before, values(variables), strict=True)]


def norm(arrays):
    return math.sqrt(sum(float(np.sum(np.square(x))) for x in arrays))


def clipped(arrays):
    return [min(1.0, CLIP / norm(arrays)) * x for x in arrays]


def gradients(variables, rank, step=0, factor=30.0):
    return [tf.constant(factor * g.numpy()) for g in problem.gradients_of([v.value for v in variables], rank, step)]


def assert_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# --- ranks ----------------------------------------------------------------------------------------------------------------
def applied(optimizer, variables, its_gradients):
    optimizer.apply(its_gradients, variables)


def case_a_rank_is_clipped_as_a_whole():
    """By argument and by prefix, in eager code and in a graph."""
    for options in ({"privacy": RANKS}, {"g": f"gaussian(clip={CLIP}, noise_multiplier=0) | none"}):
        for wrapped in (lambda f: f, tf.function):
            variables, optimizer = problem.keras_variables(), wrap(**options)
            optimizer.build(variables)
            everyone = [clipped([g.numpy().astype(np.float64) for g in gradients(variables, r)]) for r in range(hvd.size())]
            apply = wrapped(partial(applied, optimizer, variables))
            got = moved(lambda apply=apply, variables=variables: apply(gradients(variables, hvd.rank())), variables)
            assert_close(got, [sum(each) / hvd.size() for each in zip(*everyone, strict=True)])


def case_it_equals_a_local_cluster_bit_for_bit():
    """Without noise, with memory and compression."""
    variables, cluster = problem.keras_variables(), grace_ext.LocalCluster(TOPK, hvd.size(), privacy=RANKS)
    optimizer = wrap(RANKS, TOPK, simulate=True)
    optimizer.build(variables)
    apply = tf.function(lambda gs: optimizer.apply(gs, variables))
    for step in range(3):
        own = [gradients(variables, rank, step) for rank in range(hvd.size())]
        raw = [{name: g.numpy() for name, g in zip(problem.SHAPES, gs, strict=True)} for gs in own]
        before = [v.numpy() for v in variables]
        apply(own[hvd.rank()])
        for v, old, mean in zip(variables, before, cluster.step(raw).values(), strict=True):
            np.testing.assert_array_equal(v.numpy(), old - mean)


def case_a_tape_exchanges_private_gradients():
    variables, g = problem.tf_variables(), grace_ext.grace("none")
    with tf.GradientTape() as tape:
        loss = 30 * problem.loss_of(variables, hvd.rank(), 0)
    everyone = [
        clipped([30 * x.numpy().astype(np.float64) for x in problem.gradients_of(variables, rank, 0)]) for rank in range(hvd.size())
    ]
    tape = hvd.DistributedGradientTape(tape, compression=g, privacy=RANKS)
    assert tape.memory(variables).epsilon(1e-5) == 0
    assert_close(tape.gradient(loss, variables), [sum(each) / hvd.size() for each in zip(*everyone, strict=True)])
    noisy = hvd.Privacy(clip=1, noise_multiplier=3)
    with tf.GradientTape() as tape:
        loss = problem.loss_of(variables, hvd.rank(), 0)
    tape = hvd.DistributedGradientTape(tape, compression=g, privacy=noisy)  # the same Grace, with other privacy: an exchange of its own
    tape.gradient(loss, variables)
    assert math.isclose(tape.memory(variables).epsilon(1e-5), noisy.epsilon(1e-5, 1))


def case_the_transport_sees_private_gradients_only():
    """Two runs whose raw gradients differ by a factor of 1024, and whose clipped ones do not, send the same bytes."""
    seen, arrays_of = {}, HorovodTransport.arrays_of
    with same_noise(hvd.rank()):
        for private in (True, False):
            for scale in (1.0, 1024.0):
                sent = seen[private, scale] = []

                def tap(self, collective, sent=sent):
                    sent.append(bytes(memoryview(collective.array)))
                    return arrays_of(self, collective)

                with mock.patch.object(HorovodTransport, "arrays_of", tap):
                    variables = problem.keras_variables()
                    privacy = hvd.Privacy(clip=1e-3) if private else None
                    optimizer = wrap(privacy, "every(2, topk(ratio=0.1) + residual, none)", 0.0, simulate=True, check_start=False)
                    for step in range(4):
                        optimizer.apply(gradients(variables, hvd.rank(), step, scale), variables)
    if hvd.size() > 1:  # alone nothing is sent
        check_nothing_raw_is_sent(seen)


def case_accumulated_passes_are_one_release():
    """With Horovod's passes and with Keras' own accumulation; the sum of the passes is clipped, once."""
    for average in (False, True):
        variables = problem.keras_variables()
        optimizer = wrap(RANKS, backward_passes_per_step=2, average_aggregated_gradients=average)
        keras_own = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), compression="none", privacy=RANKS)
        for wrapped in (optimizer, keras_own):
            wrapped.build(variables)

            def two(wrapped=wrapped, variables=variables):
                for step in range(2):
                    wrapped.apply(gradients(variables, hvd.rank(), step), variables)

            assert norm(moved(two, variables)) <= CLIP * (1 + 1e-4)
            assert wrapped._grace.dense.driver.mechanism.releases == 1


def case_ranks_stay_equal_and_noise_differs_by_step():
    variables, optimizer = [keras.Variable(np.zeros((100, 100), np.float32), name="w")], wrap(hvd.Privacy(clip=1, noise_multiplier=3))
    steps = [moved(lambda: optimizer.apply([tf.zeros((100, 100))], variables), variables)[0] for _ in range(2)]
    assert all(abs(x.std() / (3 / math.sqrt(hvd.size())) - 1) < 0.05 for x in steps)
    assert abs(np.corrcoef(steps[0].ravel(), steps[1].ravel())[0, 1]) < 0.06
    assert all(np.array_equal(each, steps) for each in hvd.allgather_object(steps))


def case_fit_trains_and_counts_its_steps():
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)])
    privacy = hvd.Privacy(clip=1, noise_multiplier=1)
    model.compile(wrap(privacy, TOPK, 0.01), "mse", jit_compile=False)
    x = np.random.default_rng(hvd.rank()).standard_normal((32, 6)).astype(np.float32)
    model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    assert math.isclose(model.optimizer.grace_epsilon(1e-5), privacy.epsilon(1e-5, 8))
    weights = model.get_weights()
    assert all(np.array_equal(a, b) for own in hvd.allgather_object(weights) for a, b in zip(own, weights, strict=True))


# --- examples -------------------------------------------------------------------------------------------------------------
def loss_of_one(variables):
    """Returns the loss of one example, as a function of a batch that holds it alone."""
    a, b, c, scalar = variables
    return lambda x, y: tf.reduce_sum(tf.square(tf.tanh(x @ a + b) @ c * scalar - y))


def batch(rank, count=8):
    generator = np.random.default_rng(rank)
    return generator.standard_normal((count, 6)).astype(np.float32), generator.standard_normal((count, 4)).astype(np.float32)


def one_by_one(variables, rank):
    """Returns the gradients of each example of this rank, each by a tape of its own."""
    found, inner = [], [v.value for v in variables]
    for x, y in zip(*batch(rank), strict=True):
        with tf.GradientTape() as tape:
            loss = loss_of_one(inner)(x[None], y[None])
        found.append([g.numpy().astype(np.float64) for g in tape.gradient(loss, inner)])
    return found


def step_of_examples(optimizer, variables, x, y):
    inner = [v.value for v in variables]
    optimizer.apply(hvd.per_example_gradients(loss_of_one(inner), inner, x, y), variables)


def case_examples_are_clipped_one_by_one():
    """In eager code, and in a graph that takes batches of any size, whose gradients equal those of a tape per example."""
    for wrapped in (lambda f: f, lambda f: tf.function(f, input_signature=[tf.TensorSpec([None, 6]), tf.TensorSpec([None, 4])])):
        variables, optimizer = problem.keras_variables(), wrap(EXAMPLES)
        optimizer.build(variables)
        everyone = [[clipped(x) for x in one_by_one(variables, rank)] for rank in range(hvd.size())]
        expected = [sum(each) / BATCH / hvd.size() for each in zip(*(x for own in everyone for x in own), strict=True)]
        step = wrapped(partial(step_of_examples, optimizer, variables))
        assert_close(moved(lambda step=step: step(*batch(hvd.rank())), variables), expected)
        assert norm(moved(lambda step=step: step(*batch(hvd.rank(), 0)), variables)) == 0  # nobody has an example
        assert norm(moved(lambda step=step: step(*batch(hvd.rank(), 3 * hvd.rank())), variables)) <= 3 * CLIP
        assert optimizer._grace.dense.driver.mechanism.releases == 3


def case_an_example_of_a_million_or_nan_changes_the_sum_by_two_clips_at_most():
    variables = problem.keras_variables()
    plain = hvd.per_example_gradients(loss_of_one([v.value for v in variables]), variables, *batch(hvd.rank()))
    outcomes = []
    for factor in (1.0, 1e6, math.nan, 0.0):
        fresh, optimizer = problem.keras_variables(), wrap(EXAMPLES)
        changed = [g.numpy() for g in plain]
        if hvd.rank() == 0:
            for g in changed:
                g[3] *= np.float32(factor)
        got = moved(lambda o=optimizer, c=changed, f=fresh: o.apply([tf.constant(g) for g in c], f), fresh)
        outcomes.append([x * BATCH * hvd.size() for x in got])
    for other in outcomes:
        assert norm([a - b for a, b in zip(outcomes[0], other, strict=True)]) <= 2 * CLIP * (1 + 1e-4)
        assert norm([a - b for a, b in zip(outcomes[3], other, strict=True)]) <= CLIP * (1 + 1e-4)
    assert norm([a - b for a, b in zip(outcomes[2], outcomes[3], strict=True)]) < 1e-5 < norm(outcomes[1])


def case_an_empty_batch_sends_noise():
    variables, optimizer = [keras.Variable(np.zeros((100, 100), np.float32), name="w")], wrap(NOISY)
    none = hvd.per_example_gradients(lambda x: tf.reduce_sum(x @ variables[0].value), variables, np.zeros((0, 3, 100), np.float32))
    got = moved(lambda: optimizer.apply(none, variables), variables)[0]
    assert abs(got.std() / (2 / BATCH / math.sqrt(hvd.size())) - 1) < 0.05
    assert math.isclose(optimizer.grace_epsilon(1e-5), NOISY.epsilon(1e-5, 1))


def case_a_state_has_the_count():
    variables, optimizer = problem.keras_variables(), wrap(NOISY, TOPK, simulate=True)
    gradients = hvd.per_example_gradients(loss_of_one([v.value for v in variables]), variables, *batch(hvd.rank()))
    for _ in range(3):
        optimizer.apply(gradients, variables)
    resumed = wrap(NOISY, TOPK, simulate=True)
    assert resumed.grace_epsilon(1e-5) == 0
    resumed.load_grace_state_dict(optimizer.grace_state_dict())
    assert math.isclose(resumed.grace_epsilon(1e-5), NOISY.epsilon(1e-5, 3))
    resumed.apply(gradients, variables)
    assert math.isclose(resumed.grace_epsilon(1e-5), NOISY.epsilon(1e-5, 4))
    raises(GraceError, "this state was saved with", lambda: wrap(EXAMPLES).load_grace_state_dict(optimizer.grace_state_dict()))


# --- what is refused ------------------------------------------------------------------------------------------------------
def case_gradients_of_a_whole_batch_are_no_examples():
    variables, whole = problem.keras_variables(), gradients(problem.keras_variables(), hvd.rank())
    optimizer = wrap(EXAMPLES)
    raises(UnsupportedError, "unit='example' needs the gradients of each example", lambda: optimizer.apply(whole, variables))
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(wrap(EXAMPLES), "mse", jit_compile=False)
    raises(UnsupportedError, "a training step of your own", lambda: model.fit(np.zeros((4, 6)), np.zeros((4, 1)), verbose=0))
    with tf.GradientTape() as tape:
        loss = problem.loss_of([v.value for v in variables], hvd.rank(), 0)
    tape = hvd.DistributedGradientTape(tape, compression="none", privacy=EXAMPLES)
    raises(UnsupportedError, "unit='example' works with", lambda: tape.gradient(loss, variables))
    ranks = wrap(RANKS)
    examples = [tf.stack([g, g]) for g in whole]
    raises((GraceError, tf.errors.UnknownError), "shape", lambda: ranks.apply(examples, variables))
    differing = [tf.stack([g] * (2 + (place == 1))) for place, g in enumerate(whole)]
    raises((GraceError, tf.errors.UnknownError), "different numbers of examples", lambda: wrap(EXAMPLES).apply(differing, variables))


def case_sparse_gradients():
    variable = keras.Variable(np.ones((5, 3), np.float32), name="rows")
    rows = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([1, 4]), tf.constant([5, 3]))
    for spec in (RANKS, EXAMPLES):
        raises(UnsupportedError, "which rows it has tells", lambda spec=spec: wrap(spec).apply([rows], [variable]))
    assert norm(moved(lambda: wrap(RANKS, sparse_as_dense=True).apply([rows], [variable]), [variable])) <= CLIP * (1 + 1e-4)


def case_batch_normalization():
    """Is refused, with variables of its own and without; not if it is frozen."""
    for layer, refused in (
        (keras.layers.BatchNormalization(), True), (keras.layers.BatchNormalization(center=False, scale=False), True),
        (keras.layers.BatchNormalization(trainable=False), False), (keras.layers.GroupNormalization(2), False),
    ):  # fmt: skip
        model = keras.Sequential([keras.Input((6,)), keras.Sequential([keras.layers.Dense(4), layer])])
        optimizer, variables = wrap(RANKS), model.trainable_variables
        apply = lambda o=optimizer, vs=variables: o.apply([tf.ones(v.shape) for v in vs], vs)  # noqa: E731
        if refused:
            raises(UnsupportedError, "batch normalization", apply)
        else:
            apply()


def case_what_is_refused():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    raises(UnsupportedError, "LossScaleOptimizer", lambda: hvd.DistributedOptimizer(scaled, compression="gaussian | none"))
    raises(UnsupportedError, "several calls", lambda: wrap(EXAMPLES, backward_passes_per_step=2))
    accumulating = keras.optimizers.SGD(gradient_accumulation_steps=2)
    raises(UnsupportedError, "several calls", lambda: hvd.DistributedOptimizer(accumulating, privacy=EXAMPLES))
    raises(ParameterError, "privacy must be Privacy", lambda: wrap("gaussian"))
    raises(SpecSyntaxError, "give one of them", lambda: wrap(RANKS, "gaussian | none"))
    variable = problem.keras_variables()[0]
    raises(UnsupportedError, "variables of one rank alone", lambda: wrap(RANKS).register_local_var(variable))
    tape = hvd.DistributedGradientTape(tf.GradientTape(), compression="gaussian | none")
    raises(UnsupportedError, "variables of one rank alone", lambda: tape.register_local_source(variable))
    raises(UnsupportedError, "makes no gradient private", lambda: wrap(g=TOPK).grace_epsilon(1e-5))
    raises(UnsupportedError, "LocalSGD makes steps", lambda: hvd.LocalSGD(keras.optimizers.SGD(), compression="gaussian | none"))
    one = lambda x: tf.reduce_sum(x)  # noqa: E731
    for wrong in ((), (tf.constant(1.0),), (tf.zeros((2, 3)), tf.zeros(3))):
        raises(ParameterError, "counts the same examples", lambda wrong=wrong: hvd.per_example_gradients(one, [variable], *wrong))


def case_settings_that_differ_by_rank():
    if hvd.size() > 1:
        variables = problem.keras_variables()
        optimizer = wrap(hvd.Privacy(clip=1 + hvd.rank()))
        raises(GraceError, "rank", lambda: optimizer.apply(gradients(variables, hvd.rank()), variables))


def case_every_release_is_one_of_the_mechanism():
    """What is exchanged is what the mechanism returned, and nothing else."""
    variables, optimizer, made = problem.keras_variables(), wrap(hvd.Privacy(clip=1)), []
    release = Mechanism.release

    def recorded(self, *args):
        private = release(self, *args)
        made.append([x.astype(np.float64) for x in private.values()])
        return private

    with mock.patch.object(Mechanism, "release", recorded):
        got = moved(lambda: optimizer.apply(gradients(variables, hvd.rank()), variables), variables)
    everyone = hvd.allgather_object(made[0])
    assert_close(got, [sum(each) / hvd.size() for each in zip(*everyone, strict=True)])


hvd.init()
tf.config.threading.set_intra_op_parallelism_threads(1)
run_cases(hvd, globals())
