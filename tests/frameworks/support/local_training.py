"""Trains the model of tests/frameworks/support/training.py with LocalSGD, and the reference in a LocalSGDCluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grace_ext.local import LocalSGDCluster

from . import training

QSPARSE = "topk(ratio=0.05) > qsgd(bits=4) + residual"


def make_optimizer(model: torch.nn.Module, spec: str) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.0 if "cser" in spec else 0.9)


def train(hvd: Any, spec: str, steps: int, model: torch.nn.Module | None = None, **options: Any) -> tuple[torch.nn.Module, Any]:
    """Trains this rank's model. Returns the model and the optimizer."""
    model = training.make_model() if model is None else model
    optimizer = hvd.LocalSGD(make_optimizer(model, spec), model.named_parameters(), compression=spec, **options)
    run(hvd, model, optimizer, range(steps))
    return model, optimizer


def run(hvd: Any, model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        optimizer.step()


def train_in_cluster(spec: str, size: int, steps: int, **options: Any) -> list[dict[str, np.ndarray]]:
    """Trains the reference. Returns the weights of every rank's model."""
    models = [training.make_model() for _ in range(size)]
    optimizers = [make_optimizer(model, spec) for model in models]
    cluster = LocalSGDCluster(spec, size, framework="torch", **options)
    cluster.start([_values(model) for model in models])
    for step in range(steps):
        own = []
        for rank, model in enumerate(models):
            model.zero_grad()
            training.loss_of(model, rank, step).backward()
            own.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
        averaged = cluster.models[0].exchanges_gradients()
        for model, optimizer, gradients in zip(models, optimizers, cluster.gradients(own, lr=0.05), strict=True):
            for name, p in model.named_parameters() if averaged else ():
                p.grad = gradients[name].clone()
            optimizer.step()
        for model, values in zip(models, cluster.step([_values(model) for model in models]), strict=True):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(values[name])
    return [training.weights_of(model) for model in models]


def _values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}
