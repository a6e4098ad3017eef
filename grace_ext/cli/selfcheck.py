"""Runs on each rank of a job of `grace-ext check`:  python -m grace_ext.cli.selfcheck torch|tensorflow"""

from __future__ import annotations

import sys

import numpy as np

from .check import DONE


def gradient(rank: int) -> np.ndarray:
    return np.sin(np.arange(1000, dtype=np.float32) * (rank + 1))


def torch_check() -> int:
    """Makes three steps with compressed gradients through the optimizer wrapper, and compares with a LocalCluster. Returns the rank."""
    import torch

    import grace_ext
    import grace_ext.frameworks.torch as hvd

    hvd.init()
    g = grace_ext.grace("topk(ratio=0.1) + residual @ allgather")
    weight = torch.nn.Parameter(torch.zeros(1000))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), named_parameters=[("weight", weight)], compression=g)
    cluster, expected = grace_ext.LocalCluster(g, hvd.size()), np.zeros(1000, np.float32)
    for _ in range(3):
        optimizer.zero_grad()
        (weight * torch.from_numpy(gradient(hvd.rank()))).sum().backward()
        optimizer.step()
        expected = expected - cluster.step([{"weight": gradient(rank)} for rank in range(hvd.size())])["weight"]
    assert hvd.size() == 2, f"expected 2 ranks, found {hvd.size()}"
    assert np.array_equal(weight.detach().numpy(), expected), "weights differ from the simulation's"
    rank = hvd.rank()
    hvd.shutdown()
    return rank


def tensorflow_check() -> int:
    """Does the same through the gradient tape. Returns the rank."""
    import tensorflow as tf

    import grace_ext
    import grace_ext.frameworks.tensorflow as hvd

    hvd.init()
    g = grace_ext.grace("topk(ratio=0.1) + residual @ allgather")
    weight = tf.Variable(tf.zeros(1000), name="weight")
    cluster, expected = grace_ext.LocalCluster(g, hvd.size()), np.zeros(1000, np.float32)
    for _ in range(3):
        with tf.GradientTape() as tape:
            tape = hvd.DistributedGradientTape(tape, compression=g)
            loss = tf.reduce_sum(weight * gradient(hvd.rank()))
        weight.assign_sub(tape.gradient(loss, weight))
        expected = expected - cluster.step([{"weight": gradient(rank)} for rank in range(hvd.size())])["weight"]
    assert hvd.size() == 2, f"expected 2 ranks, found {hvd.size()}"
    assert np.array_equal(weight.numpy(), expected), "weights differ from the simulation's"
    rank = hvd.rank()
    hvd.shutdown()
    return rank


def main() -> None:
    """Runs the check of the framework that the command line names; rank 0 prints DONE if it passed."""
    if {"torch": torch_check, "tensorflow": tensorflow_check}[sys.argv[1]]() == 0:
        print(DONE, flush=True)


if __name__ == "__main__":
    main()
