"""Cases of mixed precision with Keras on 2 ranks. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.frameworks.support import tf_training as problem  # noqa: E402
from tests.frameworks.support.cases import raises, run_cases  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(1)
TOPK = "topk(ratio=0.1) + residual"
#: Memories with one array and with two, with a shared momentum, shards, and the learning rate.
MEMORIES = (
    TOPK, "topk(ratio=0.1) + dgc", "topk(ratio=0.1) + ef21", "topk(ratio=0.1) + gradient_compression", "topk(ratio=0.1) + efsignsgd",
    "efsignsgd(block=16) + dist_ef_block(momentum=0.5) @ reduce_scatter(follow_rate=True)",
)  # fmt: skip


class Amp:
    def __init__(self, spec: str = TOPK, scale: float | None = 2.0**10):
        self.variables = problem.keras_variables()
        plain = keras.optimizers.SGD(problem.LR)
        if scale is not None:
            plain = keras.optimizers.LossScaleOptimizer(plain, initial_scale=scale, dynamic_growth_steps=2)
        self.optimizer = hvd.DistributedOptimizer(plain, compression=grace_ext.grace(spec))
        self.optimizer.build(self.variables)
        self.scaled = scale is not None
        self.one = tf.function(self._one, autograph=False)

    def _one(self, x: tf.Tensor, factor: tf.Tensor) -> None:
        a, b, c, scalar = self.variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.tanh(x @ a.value + b.value) @ c.value * scalar.value - 1.0)) * factor
            if self.scaled:
                loss = self.optimizer.scale_loss(loss)
        self.optimizer.apply(tape.gradient(loss, [v.value for v in self.variables]), self.variables)

    def step(self, i: int, factor: float = 1.0) -> None:
        x = np.random.default_rng(100 * i + hvd.rank()).standard_normal((8, 6)).astype(np.float32)
        self.one(tf.constant(x), tf.constant(factor))

    @property
    def scale(self) -> float:
        return float(self.optimizer.dynamic_scale.numpy())

    def memory(self) -> dict[str, bytes]:
        return {key: x.tobytes() for key, x in self.optimizer.grace_state_dict()["state"].items()}

    def weights(self) -> list[bytes]:
        return [np.asarray(v.numpy()).tobytes() for v in self.variables]


def case_growing_scale_changes_no_bit():
    for spec in (TOPK, "powersgd(rank=2) + residual"):
        scaled, plain = Amp(spec), Amp(spec, None)
        for i in range(8):
            scaled.step(i)
            plain.step(i)
        assert scaled.scale == 2.0**14, scaled.scale
        assert scaled.weights() == plain.weights(), spec
        names = [sorted(one.memory().values()) for one in (scaled, plain)]
        assert names[0] == names[1] and names[0], spec


def case_one_ranks_inf_is_skipped_by_all():
    for spec in MEMORIES:
        amp = Amp(spec)
        for i in range(3):
            amp.step(i)
        scale, memory, weights = amp.scale, amp.memory(), amp.weights()
        amp.step(3, factor=float("inf") if hvd.rank() == 1 else 1.0)
        assert amp.memory() == memory and memory, spec
        assert amp.weights() == weights and amp.scale == scale / 2, spec
        amp.step(4)
        assert amp.weights() != weights, spec
        assert len(set(hvd.allgather_object((tuple(amp.weights()), amp.scale)))) == 1, spec


def case_inside_of_a_loss_scale_optimizer_is_refused():
    inner = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=grace_ext.grace(TOPK))
    outer = keras.optimizers.LossScaleOptimizer(inner)
    variables = [keras.Variable(np.ones((4, 4), np.float32))]
    raises(UnsupportedError, "hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(", lambda: outer.build(variables))


def case_fit_under_mixed_float16():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input((6,)), keras.layers.Dense(16, "tanh", dtype="mixed_float16"), keras.layers.Dense(1, dtype="float32"),
    ])  # fmt: skip
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=2.0**8)
    optimizer = hvd.DistributedOptimizer(scaled, compression=grace_ext.grace(TOPK))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    x = np.random.default_rng(hvd.rank()).standard_normal((64, 6)).astype(np.float32)
    history = model.fit(
        x, x[:, :1] * 2 + 1, batch_size=16, epochs=8, verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    ).history["loss"]  # fmt: skip
    assert history[-1] < 0.5 * history[0], history
    assert len(set(hvd.allgather_object(b"".join(w.tobytes() for w in model.get_weights())))) == 1


if __name__ == "__main__":
    hvd.init()
    run_cases(hvd, globals())
    hvd.shutdown()
