"""Defines a small model, its data by rank, and 20 steps of training, to compare real jobs with a LocalCluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import grace_ext

STEPS = 20
SPECS = (
    "none",
    "fp16",
    "bf16",
    "topk(ratio=0.05) + residual",
    "topk(ratio=0.05, values='fp16') + residual @ broadcast",
    "randomk(ratio=0.1) + residual",
    "threshold(threshold=0.01) + residual",
    "threshold(threshold=0.01) + residual @ broadcast",
    "qsgd(bits=4)",
    "signsgd + none",
    "efsignsgd + residual",
    "powersgd(rank=2) + residual",
    "fp16 + residual @ allgather",
    "efsignsgd(block=64) + residual @ reduce_scatter",
    "topk(ratio=0.05) + residual @ sparse_allreduce",
    "signsgd + residual @ allreduce",
    "lqsgd(rank=2) + powersgd",
    "powersgd_plus(rank=2, refresh_period=5) + residual",
    "topk(ratio=0.05) + ef21",
)
#: For shards of a model, which FSDP2 has sharded.
SHARDED_SPECS = (
    "none",
    "topk(ratio=0.1) + residual",
    "threshold(threshold=0.01) + residual",
    "powersgd(rank=2) + residual",
    "efsignsgd + residual",
    "qsgd(bits=4)",
    "terngrad",
    "by_size(min_elements=100, large=topk(ratio=0.1) + residual)",
    "lgreco(base=powersgd(rank=2) + residual, every=3, window=2)",
)


def make_model() -> torch.nn.Module:
    """Returns a model with the same weights in every process; one parameter never gets a gradient."""
    torch.manual_seed(7)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    )
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(5)))
    return model


def make_optimizer(model: torch.nn.Module, spec: str = "none") -> torch.optim.Optimizer:
    """Returns SGD, with momentum unless the spec's memory is the momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.0 if any(m.is_momentum for m in grace_ext.grace(spec).memories) else 0.9)


def loss_of(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    """Returns this rank's loss in this step, on its own data."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 1, 8, 8, generator=generator)
    y = torch.randint(3, (8,), generator=generator)
    return torch.nn.functional.cross_entropy(model(x), y)


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


class Bag(torch.nn.Module):
    """An embedding and a linear layer; ranks look up different rows."""

    def __init__(self, sparse: bool):
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(20, 4, sparse=sparse)
        self.out = torch.nn.Linear(4, 2)

    def loss(self, rank: int, step: int) -> torch.Tensor:
        rows = torch.tensor([1 + step, 5, 5, 7 + rank])
        return self.out(self.table(rows)).square().sum()


class Shuffled(torch.nn.Module):
    """Layers that ranks use in different orders; rank 1 does not use some of them."""

    ORDERS = ([0, 1, 2, 3, 4, 5], [5, 0, 3])

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(40, 40) for _ in range(6))

    def loss(self, rank: int) -> torch.Tensor:
        return sum(self.parts[i](torch.ones(2, 40) * (rank + 1)).square().mean() for i in self.ORDERS[rank])


def train(hvd: Any, compression: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    """Trains this rank's part with grace_ext's optimizer. Returns the final weights, and this rank's losses."""
    model = make_model()
    optimizer = make_optimizer(model, str(compression))
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return weights_of(model), losses


def steps_in_cluster(spec: str, size: int, ranks_per_node: int = 1) -> Iterator[tuple[torch.nn.Module, float]]:
    """Trains the reference with all ranks in this process. Yields per step the model after it, and the ranks' mean loss."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), size, framework="torch", ranks_per_node=ranks_per_node)
    model = make_model()
    optimizer = make_optimizer(model, spec)
    for step in range(STEPS):
        by_rank, losses = [], []
        for rank in range(size):
            model.zero_grad()
            loss = loss_of(model, rank, step)
            loss.backward()
            losses.append(loss.item())
            gradients: dict[str, Any] = {}
            for name, p in model.named_parameters():
                gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            by_rank.append(gradients)
        mean = cluster.step(by_rank, lr=0.05)
        for name, p in model.named_parameters():
            p.grad = mean[name]
        optimizer.step()
        yield model, sum(losses) / size


def train_in_cluster(spec: str, size: int) -> dict[str, np.ndarray]:
    """Trains the reference. Returns its final weights."""
    *_, (model, _) = steps_in_cluster(spec, size)
    return weights_of(model)
