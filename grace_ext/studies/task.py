"""Defines what is trained in a comparison: a model, its data, optimizer and score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import ModelError
from ..planning.models import made, names_code, on_its_own
from . import data
from .transformer import transformer

HOW = (
    "--data takes 'mnist', 'charlm' or module:callable, which returns a grace_ext.studies.task.Task: Task(model=function that returns a "
    "torch model, train=(inputs, targets), test=(inputs, targets), lr=...)"
)


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of scores [..., classes] and targets [...], in nats."""
    return functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


def accuracy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns how often the largest of scores [..., classes] is the target, in percent."""
    return 100 * (scores.argmax(dim=-1) == targets).double().mean()


def bits(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy in bits."""
    return cross_entropy(scores, targets) / math.log(2)


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99))


@dataclass(frozen=True)
class Task:
    """Describes one training, which every spec of a comparison repeats.

    model: returns a new torch model, whose weights depend on torch's seed alone; it maps a batch of inputs to scores [batch, ..., classes].
    train, test: (inputs, targets), tensors whose first dimension counts examples.
    lr: the highest learning rate; it rises to it over the first fifth of the steps, and falls to 0 after that.
    steps, batch: steps of the training, and examples per rank and step.
    optimizer: makes the optimizer of parameters and learning rate; by default SGD with momentum 0.9.
    loss, score: functions of scores and targets that return a mean over examples; by default cross-entropy, and accuracy in percent.
    unit: of the score. higher_is_better: whether a higher score is better."""

    model: Callable[[], nn.Module]
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    lr: float = 0.01
    steps: int = 744
    batch: int = 16
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = sgd
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = accuracy
    unit: str = "accuracy, %"
    higher_is_better: bool = True

    @torch.no_grad()
    def scored(self, model: nn.Module) -> float:
        """Returns the score on the test data. Leaves the model in the mode in which it was."""
        training = model.training
        model.eval()
        inputs, targets = self.test
        total = sum(float(self.score(model(x), y)) * len(x) for x, y in zip(inputs.split(250), targets.split(250), strict=True))
        model.train(training)
        return total / len(inputs)


def cnn() -> nn.Module:
    """Returns the network of examples/torch_mnist.py: 30,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def mnist() -> Task:
    """Trains the network of examples/torch_mnist.py on 3,000 of MNIST's digits; 2,000 others give the score."""
    images, labels = data.mnist()
    images = (images - 0.1307) / 0.3081
    return Task(cnn, (images[:3000], labels[:3000]), (images[3000:], labels[3000:]))


def charlm() -> Task:
    """Trains a character Transformer (two layers of width 64, 113,000 parameters) on the text that Python's help() prints, in windows of 64
    letters; 256 windows of the last tenth give the score."""
    (text, letters), context = data.english(), 64
    cut, held_out = len(text) * 9 // 10, 256

    def windows(part: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return part[:-1].unfold(0, context, step), part[1:].unfold(0, context, step)

    test = windows(text[cut:], (len(text) - cut - context) // held_out)
    return Task(
        lambda: transformer(letters, 64, 2), windows(text[:cut], 1), test, lr=4e-3, steps=400, batch=8, optimizer=adamw, score=bits,
        unit="bits per character", higher_is_better=False,
    )  # fmt: skip


TASKS: dict[str, Callable[[], Task]] = {"mnist": mnist, "charlm": charlm}


@lru_cache
def task(name: str) -> Task:
    """Returns a task by name: 'mnist', 'charlm' or 'module:callable'. Raises ModelError, which says what is wrong with it."""
    if name in TASKS:
        return TASKS[name]()
    if not names_code(name):
        raise ModelError(f"--data {name!r} names no task. {HOW}")
    with on_its_own():
        return checked(name, made(name))


def checked(name: str, found: Any) -> Task:
    """Returns what a user's callable returned as a task. Raises ModelError if it cannot be one."""
    if not isinstance(found, Task):
        raise ModelError(f"{name!r} returns {type(found).__name__}, not a Task. {HOW}")
    for which, pair in (("train", found.train), ("test", found.test)):
        fine = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, torch.Tensor) and part.ndim for part in pair)
        if not fine or len(pair[0]) != len(pair[1]) or not len(pair[0]):
            raise ModelError(f"{name!r} has no {which} data: two tensors (inputs, targets) of the same length are needed. {HOW}")
    if min(found.steps, found.batch) < 1 or not found.lr > 0:
        raise ModelError(f"{name!r} has steps={found.steps}, batch={found.batch}, lr={found.lr}: all must be above 0")
    try:
        model = found.model()
        inputs, targets = (part[:2] for part in found.train)
        found.loss(model(inputs), targets).backward()
        found.scored(model)
    except Exception as error:  # the user's own code
        raise ModelError(f"{name!r} fails on two of its examples: {type(error).__name__}: {error}. {HOW}") from error
    return found
