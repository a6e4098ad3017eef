"""A single rank sends nothing, but what the training is made of stays: a memory that is the momentum, and votes."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext

STEPS, LR = 5, 0.5
#: A spec, and what a simulated rank goes through that gives the same without compression.
ALONE = [
    ("topk(ratio=0.1) + update_compression(nesterov=True)", "topk(ratio=1) + update_compression(nesterov=True)"),
    ("randomk(ratio=0.1) + ef21_sgdm", "none + ef21_sgdm"),
    ("by_size(large=topk(ratio=0.1) + dgc, min_elements=4)", "topk(ratio=1) + dgc(masking=False)"),
    ("signum(momentum=0.5)", "signum(momentum=0.5)"),
    ("topk(ratio=0.1) + residual", "none"),
    ("topk(ratio=0.1) + momentum_compression", "none"),
]


def gradients(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(60).astype(np.float32)


def expected(spec: str) -> np.ndarray:
    """Returns what SGD makes of zeros after STEPS steps, by results of one simulated rank."""
    cluster, weights = grace_ext.LocalCluster(grace_ext.grace(spec), 1), np.zeros(60, np.float32)
    for step in range(STEPS):
        weights = weights - np.float32(LR) * cluster.step([{"w": gradients(step)}], lr=LR)["w"]
    return weights


def momentum_of(spec: str) -> float:
    return 0.9 if "momentum_compression" in spec else 0.0


def with_momentum(spec: str, plain: str) -> np.ndarray:
    """Returns `expected`, or, if the optimizer must have momentum, what torch's SGD makes of the gradients."""
    if not momentum_of(spec):
        return expected(plain)
    weights, m = np.zeros(60, np.float32), np.zeros(60, np.float32)
    for step in range(STEPS):
        m = np.float32(0.9) * m + gradients(step)
        weights = weights - np.float32(LR) * m
    return weights


def torch_weights(spec: str, wrap) -> np.ndarray:
    import torch

    weight = torch.nn.Parameter(torch.zeros(60))
    optimizer = torch.optim.SGD([weight], LR, momentum=momentum_of(spec))
    optimizer = wrap(optimizer, weight) or optimizer
    for step in range(STEPS):
        optimizer.zero_grad()
        (weight * torch.from_numpy(gradients(step))).sum().backward()
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize(("spec", "plain"), ALONE)
def test_torch_wrapper(spec, plain):
    import grace_ext.frameworks.torch as hvd

    hvd.init()
    try:
        got = torch_weights(spec, lambda optimizer, w: hvd.DistributedOptimizer(optimizer, named_parameters=[("w", w)], compression=spec))
    finally:
        hvd.shutdown()  # other tests of this process begin without it
    assert np.allclose(got, with_momentum(spec, plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spec", "plain"), [pair for pair in ALONE if not momentum_of(pair[0])])
def test_mpi(spec, plain):
    import grace_ext.frameworks.numpy as gnp

    weights = np.zeros(60, np.float32)
    with gnp.Exchange(spec) as exchange:
        for step in range(STEPS):
            weights = weights - np.float32(LR) * exchange.step({"w": gradients(step)}, lr=LR)["w"]
    assert np.allclose(weights, expected(plain), rtol=1e-5, atol=1e-6)
