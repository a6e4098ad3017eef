"""Defines what is attacked: a model, its loss, and the data whose batches a rank trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..frameworks.torch.private import gradients_of_examples
from ..planning.models import made, names_code, on_its_own
from ..studies.data import mnist

HOW = (
    "--model takes 'lenet', 'mlp' or module:callable, which returns a torch model, (model, loss) or (model, loss, (inputs, targets)). The "
    "model maps float32 inputs of shape [batch, ...] to scores of shape [batch, classes]; loss(scores, targets) gives a number, by default "
    "the cross-entropy; without inputs and targets, images are MNIST's, [batch, 1, 28, 28] from 0 to 1, in 10 classes"
)


@dataclass(frozen=True)
class Victim:
    """Holds a model, its loss and its data. usual_loss: whether the loss is the cross-entropy, whose targets may be probabilities."""

    model: nn.Module
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    inputs: torch.Tensor
    targets: torch.Tensor
    usual_loss: bool = True

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def box(self) -> tuple[float, float]:
        """Returns the range of the inputs, which an attacker knows."""
        return float(self.inputs.min()), float(self.inputs.max())

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs)

    def gradients(self, inputs: torch.Tensor, targets: torch.Tensor, *, differentiable: bool = False) -> dict[str, torch.Tensor]:
        """Returns the gradients of the loss by parameter; zeros for parameters that it does not depend on."""
        named = self.parameters
        found = torch.autograd.grad(
            self.loss(self.model(inputs), targets), list(named.values()), create_graph=differentiable, allow_unused=True
        )
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}

    def gradients_of_examples(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the gradient of each example by parameter, with one dimension more, in front, which counts the examples."""
        return gradients_of_examples(self.model, self.loss, inputs, targets)[0]

    def label_gradient(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Returns the gradient of the last linear layer's bias, which gives the labels away; without a bias, the sums of the rows of its
        weight, which have the same signs if what it is given is not negative. None if the model has no linear layer."""
        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)]
        if not layers:
            return None
        name = f"{layers[-1][0]}." if layers[-1][0] else ""
        if f"{name}bias" in gradients:
            return gradients[f"{name}bias"]
        return gradients[f"{name}weight"].sum(dim=1) if f"{name}weight" in gradients else None

    def first_layer(self) -> str | None:
        """Returns the name of the first linear layer, with a dot, if inputs reach it as they are and it has a bias; else None."""
        for name, layer in self.model.named_modules():
            if any(True for _ in layer.children()) or isinstance(layer, (nn.Flatten, nn.Identity)):
                continue
            plain = isinstance(layer, nn.Linear) and layer.bias is not None and layer.in_features == self.inputs[0].numel()
            return (f"{name}." if name else "") if plain else None
        return None


def lenet() -> nn.Module:
    """Returns the network of the DLG paper for images of 28 x 28: its sigmoids can be differentiated twice, which favours the attacker."""
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(588, 10),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def victim(name: str, seed: int = 0) -> Victim:
    """Returns a victim by name: 'lenet', 'mlp' or 'module:callable'. Raises ModelError, which says what is wrong with it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name in ("lenet", "mlp"):
            return Victim({"lenet": lenet, "mlp": mlp}[name](), nn.functional.cross_entropy, *mnist())
        if not names_code(name):
            raise ModelError(f"--model {name!r} is none of these. {HOW}")
        with on_its_own():
            return checked(name, made(name))


def checked(name: str, found: Any) -> Victim:
    """Returns what a user's callable returned as a victim. Raises ModelError if it cannot be one."""
    model, loss, data = (*found, None, None)[:3] if isinstance(found, (tuple, list)) and 1 <= len(found) <= 3 else (found, None, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name!r} returns {type(model).__name__}, not a torch model. {HOW}")
    if loss is not None and not callable(loss):
        raise ModelError(f"{name!r} returns a loss of type {type(loss).__name__}, which cannot be called. {HOW}")
    try:
        inputs, targets = mnist() if data is None else (torch.as_tensor(part) for part in data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name!r} returns data that are not (inputs, targets): {error}. {HOW}") from error
    if len(inputs) != len(targets) or len(inputs) < 2:
        raise ModelError(f"{name!r} returns {len(inputs)} inputs and {len(targets)} targets: one target each is needed, and two or more")
    # Dropout and statistics of batches would only blur what an attacker sees.
    victim = Victim(model.eval(), loss or nn.functional.cross_entropy, inputs.float(), targets, usual_loss=loss is None)
    _try(name, victim)
    return victim


def _try(name: str, victim: Victim) -> None:
    """Raises ModelError unless the model takes its inputs, and a gradient reaches some of its parameters."""
    one = victim.inputs[:2]
    if not victim.parameters:
        raise ModelError(f"{name!r} has no parameters that are trained (requires_grad), so nothing would be sent")
    try:
        scores = victim.scores(one)
        if scores.ndim != 2 or len(scores) != 2:
            raise ValueError(f"it returns scores of shape {list(scores.shape)} for two inputs, expected [2, classes]")
        gradients = victim.gradients(one, victim.targets[:2])
    except Exception as error:  # the user's own code
        raise ModelError(f"{name!r} fails on inputs of shape {list(one.shape)}: {type(error).__name__}: {error}. {HOW}") from error
    if not any(bool(g.any()) for g in gradients.values()):
        raise ModelError(f"{name!r} has a gradient of zeros on its first two inputs, so nothing could be recovered from it: check its loss")
