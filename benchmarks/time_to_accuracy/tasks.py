"""Defines the tasks of time_to_accuracy.py: each has a model, examples, an optimizer, a score on held-out data, and a target score."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from grace_ext.studies import data
from grace_ext.studies.transformer import transformer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import torch_mnist  # noqa: E402

#: The most steps that examples are drawn for.
MOST_STEPS = 20_000
#: The mean of this many evaluations in a row must reach the target, because a single one may do so by chance.
SMOOTH = 3


class Task:
    """Defines what is trained. The learning rate grows to `lr` over `rise` steps and stays. It was tuned on dense training (`--tune`)."""

    name: str
    unit: str
    higher_is_better: bool
    target: float
    batch: int  # examples per rank and step
    lr: float
    rates: tuple[float, ...]  # that --tune tries
    rise: int
    every: int = 10  # steps from one evaluation to the next
    optimizer: str

    def make_model(self) -> nn.Module:
        raise NotImplementedError

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def score(self, model: nn.Module, rank: int, size: int) -> float:
        """Scores this rank's share of the held-out examples; the mean over the ranks counts. Leaves the model in training mode."""
        raise NotImplementedError

    def examples(self) -> int:
        """Returns the number of training examples."""
        raise NotImplementedError

    def batches(self, seed: int, rank: int, size: int) -> Iterator[torch.Tensor]:
        """Yields the indices of this rank's examples of each step; those of all ranks together depend on seed and world size alone."""
        draw, step = torch.Generator().manual_seed(seed), self.batch * size
        for _ in range(MOST_STEPS):
            yield torch.randint(self.examples(), (step,), generator=draw)[rank::size]

    def reached(self, score: float) -> bool:
        return score >= self.target if self.higher_is_better else score <= self.target

    def recipe(self) -> dict[str, object]:
        """Returns the settings that a result depends on."""
        keys = ("unit", "target", "batch", "optimizer", "lr", "rise", "every")
        parameters = sum(p.numel() for p in self.make_model().parameters())
        return {**{key: getattr(self, key) for key in keys}, "parameters": parameters}


class MnistCNN(Task):
    """Trains the network of PyTorch's basic MNIST example without its dropout (1.2 million parameters, nearly all in one layer) on 3,000
    digits of examples/torch_mnist.py; 1,000 others give the score."""

    name, unit, higher_is_better, target = "mnist-cnn", "test accuracy, %", True, 93.0
    batch, lr, rates, rise, optimizer = 8, 0.01, (0.005, 0.01, 0.02), 20, "SGD(momentum=0.9)"

    def __init__(self) -> None:
        self.images, self.labels, test_images, test_labels = torch_mnist.load()
        self.test_images, self.test_labels = test_images[:1000], test_labels[:1000]

    def make_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def make_optimizer(self, model, lr):
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def examples(self):
        return len(self.images)

    def loss(self, model, batch):
        return cross_entropy(model(self.images[batch]), self.labels[batch])

    def score(self, model, rank, size):
        accuracy = torch_mnist.test(model, self.test_images[rank::size], self.test_labels[rank::size])
        model.train()
        return accuracy


class CharTransformer(Task):
    """Trains a character-level Transformer (4 layers of width 256, 3.2 million parameters) on the English text that Python's help() prints.
    The last tenth is held out; 64 windows spread over it give the score."""

    name, unit, higher_is_better, target = "char-transformer", "validation bits per character", False, 3.2
    batch, lr, rates, rise, optimizer = 1, 5e-4, (2.5e-4, 5e-4, 1e-3), 20, "AdamW(betas=(0.9, 0.99))"
    every = 20
    d, layers, heads, context, windows = 256, 4, 4, 128, 64

    def __init__(self) -> None:
        ids, self.letters = data.english()
        cut = len(ids) * 9 // 10
        self.text, self.held_out = ids[:cut], ids[cut:]

    def make_model(self) -> nn.Module:
        return transformer(self.letters, self.d, self.layers, self.heads)

    def make_optimizer(self, model, lr):
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)

    def examples(self):
        return len(self.text) - self.context

    def window(self, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return text[starts[:, None] + torch.arange(self.context + 1)]

    def loss(self, model, batch):
        return self.of(model, self.window(self.text, batch))

    def of(self, model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def score(self, model, rank, size):
        starts = torch.linspace(0, len(self.held_out) - self.context - 1, self.windows).long()
        parts = self.window(self.held_out, starts[rank::size]).split(8)
        return sum(self.of(model, part).item() for part in parts) / len(parts) / math.log(2)


TASKS: dict[str, type[Task]] = {task.name: task for task in (MnistCNN, CharTransformer)}
