"""Defines a small TensorFlow problem, its gradients by rank, and the reference training in a LocalCluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import grace_ext

STEPS, LR = 8, 0.1
SHAPES = {"a": (6, 16), "b": (16,), "c": (16, 4), "scalar": ()}
SPECS = (
    "none",
    "fp16",
    "bf16",
    "topk(ratio=0.1) + residual",
    "threshold(threshold=0.01) + residual @ broadcast",
    "randomk(ratio=0.1) + residual",
    "qsgd(bits=4)",
    "signsgd + none",
    "efsignsgd + residual",
    "powersgd(rank=2) + residual",
    "efsignsgd(block=16) + residual @ reduce_scatter",
    "topk(ratio=0.1) + residual @ sparse_allreduce",
    "signsgd + residual @ allreduce",
    "lqsgd + powersgd",
    "powersgd_plus(rank=2, refresh_period=3) + residual",
    "topk(ratio=0.1) + dgc",
)
#: Specs for wrappers that know the learning rate and all variables at once.
WITH_AN_OPTIMIZER = (
    "topk(ratio=0.1) + efsignsgd",
    "topk(ratio=0.1) + dgc(clipping=0.1)",
    "every(2, topk(ratio=0.1) + efsignsgd, powersgd(rank=2) + residual)",
    "efsignsgd(block=16) + dist_ef_block(momentum=0.5) @ reduce_scatter(follow_rate=True)",
)


def initial() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [0.3 * generator.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]


def tf_variables() -> list[tf.Variable]:
    return [tf.Variable(w, name=n) for n, w in zip(SHAPES, initial(), strict=True)]


def keras_variables() -> list[keras.Variable]:
    return [keras.Variable(w, name=n) for n, w in zip(SHAPES, initial(), strict=True)]


def loss_of(weights: Sequence[Any], rank: int, step: int) -> tf.Tensor:
    """Returns this rank's loss in this step, on its own data."""
    x = tf.constant(np.random.default_rng(100 * step + rank).standard_normal((8, 6)).astype(np.float32))
    a, b, c, scalar = weights
    return tf.reduce_mean(tf.square(tf.tanh(x @ a + b) @ c * scalar - 1.0))


def gradients_of(weights: Sequence[Any], rank: int, step: int) -> list[tf.Tensor]:
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = loss_of(weights, rank, step)
    return tape.gradient(loss, weights)


def in_a_graph(optimizer: Any, variables: Sequence[keras.Variable]) -> tuple[Callable, list]:
    """Returns (the Keras optimizer's step as a function of gradients, a list with one entry per tracing of it)."""
    traces = []

    @tf.function(autograph=False)
    def apply(gradients: list[tf.Tensor]) -> None:
        traces.append(1)
        optimizer.apply(gradients, variables)

    return apply, traces


def train_by_tape(
    hvd: Any, variables: Sequence[Any], compression: Any, graph: bool = False, steps: Iterable[int] | None = None
) -> list[float]:
    """Trains this rank's part by plain SGD on the gradients of grace_ext's tape. Returns its losses."""

    def one_step(step: int) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape = hvd.DistributedGradientTape(tape, compression=compression)
            loss = loss_of(variables, hvd.rank(), step)
        for v, g in zip(variables, tape.gradient(loss, variables), strict=True):
            v.assign(v - LR * g)
        return loss

    # A new tf.function per step, because retracing must keep the memory.
    return [float((tf.function(one_step) if graph else one_step)(step)) for step in steps or range(STEPS)]


def train(hvd: Any, compression: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    """Trains new tf.Variables by `train_by_tape`. Returns the final weights by name, and this rank's losses."""
    variables = tf_variables()
    losses = train_by_tape(hvd, variables, compression)
    return {v.name: v.numpy() for v in variables}, losses


def momentum_of(spec: str) -> float:
    """Returns the momentum that SGD must have beside this spec's memory; 0 if it needs none."""
    return next((m.optimizer_momentum for m in grace_ext.grace(spec).memories if m.optimizer_momentum is not None), 0.0)


def steps_in_cluster(
    spec: str, size: int, names: Sequence[str] | None = None, per_node: int = 1
) -> Iterator[tuple[dict[str, np.ndarray], float]]:
    """Trains the reference with all ranks in this process. Yields per step the weights by name after it, and the ranks' mean loss. names:
    those of the variables in the real job; None: those of `tf_variables`."""
    names = names or [v.name for v in tf_variables()]
    cluster, weights = grace_ext.LocalCluster(grace_ext.grace(spec), size, ranks_per_node=per_node), initial()
    velocities, momentum = [np.zeros_like(w) for w in weights], momentum_of(spec)
    for step in range(STEPS):
        by_rank, losses = [], []
        for rank in range(size):
            constants = [tf.constant(w) for w in weights]
            losses.append(float(loss_of(constants, rank, step)))
            by_rank.append({name: g.numpy() for name, g in zip(names, gradients_of(constants, rank, step), strict=True)})
        mean = cluster.step(by_rank, lr=LR)
        velocities = [momentum * u + np.asarray(mean[name]) for name, u in zip(names, velocities, strict=True)]
        weights = [w - np.float32(LR) * u for u, w in zip(velocities, weights, strict=True)]
        yield dict(zip(names, weights, strict=True)), sum(losses) / size


def train_in_cluster(spec: str, size: int, names: Sequence[str] | None = None, per_node: int = 1) -> dict[str, np.ndarray]:
    """Trains the reference. Returns its final weights."""
    *_, (weights, _) = steps_in_cluster(spec, size, names, per_node)
    return weights
