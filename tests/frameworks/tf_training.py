"""A small TensorFlow problem, its gradients by rank, and the reference training in a LocalCluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
#: For wrappers that know the learning rate, and all variables at once.
WITH_AN_OPTIMIZER = (
    "topk(ratio=0.1) + efsignsgd",
    "topk(ratio=0.1) + dgc(clipping=0.1)",
    "efsignsgd(block=16) + dist_ef_block(momentum=0.5) @ reduce_scatter(follow_rate=True)",
)


def initial() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [0.3 * generator.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]


def loss_of(weights: Sequence[Any], rank: int, step: int) -> tf.Tensor:
    """This rank's loss at this step, on data of its own."""
    x = tf.constant(np.random.default_rng(100 * step + rank).standard_normal((8, 6)).astype(np.float32))
    a, b, c, scalar = weights
    return tf.reduce_mean(tf.square(tf.tanh(x @ a + b) @ c * scalar - 1.0))


def gradients_of(weights: Sequence[Any], rank: int, step: int) -> list[tf.Tensor]:
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = loss_of(weights, rank, step)
    return tape.gradient(loss, weights)


def train_in_cluster(spec: str, size: int, names: Sequence[str], steps: int = STEPS, framework: str = "numpy") -> list[np.ndarray]:
    """The reference: all ranks in this process. `names` are those the real job gives the variables; plain SGD."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), size, framework=framework)
    weights = initial()
    for step in range(steps):
        by_rank = []
        for rank in range(size):
            gradients = gradients_of([tf.constant(w) for w in weights], rank, step)
            by_rank.append({name: g.numpy() for name, g in zip(names, gradients, strict=True)})
        mean = cluster.step(by_rank, lr=LR)
        weights = [w - np.float32(LR) * np.asarray(mean[name]) for name, w in zip(names, weights, strict=True)]
    return weights
