"""Infers whether an example was trained on, from the loss: members of the training data have a lower one (Yeom et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import functional_call, grad, vmap

from ..cluster import LocalCluster
from ..composition import making
from ..frameworks.torch.ops import HostOps
from ..parts.tensor import StepInfo, TensorSpec
from ..privacy.mechanism import Mechanism
from ..privacy.settings import Privacy
from .inversion import Tick
from .victim import Victim

RATE, BATCH = 0.2, 50


@dataclass(frozen=True)
class Membership:
    """auc: the probability that a member has a lower loss than an example that was not trained on; a guess has 0.5. train, test: accuracy
    on members and on others."""

    spec: str
    auc: float
    train: float
    test: float


def infer(
    name: str, spec: making.Spec, make: Callable[[int], Victim], tick: Tick, *, private: bool = False, seeds: int = 3, members: int = 500,
    epochs: int = 60,
) -> Membership:  # fmt: skip
    """Trains a model on `members` examples with compressed gradients, so long that it knows them by heart, and tells them by their losses.
    Returns means over seeds. private: clips the gradient of each example to 1, and adds noise of deviation 1 to their sum."""
    found = [_once(spec, make(seed), seed, members, epochs, private, tick, seeds) for seed in range(seeds)]
    return Membership(name, *(sum(column) / seeds for column in zip(*found, strict=True)))


def _once(
    spec: making.Spec, victim: Victim, seed: int, members: int, epochs: int, private: bool, tick: Tick, seeds: int
) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(seed)
    members = min(members, len(victim.inputs) // 2)
    order = torch.randperm(len(victim.inputs), generator=generator)
    inside, outside = order[:members], order[members : 2 * members]
    cluster, private_of = LocalCluster(spec, 1, framework="torch"), _mechanism(victim) if private else None
    for _ in range(epochs):
        for chosen in inside[torch.randperm(members, generator=generator)].split(BATCH):
            inputs, targets = victim.inputs[chosen], victim.targets[chosen]
            gradients = private_of(inputs, targets) if private_of else victim.gradients(inputs, targets)
            result = cluster.step([gradients], lr=RATE)
            with torch.no_grad():
                for name, parameter in victim.parameters.items():
                    parameter.sub_((result[0] if isinstance(result, list) else result)[name], alpha=RATE)
        tick(1 / (epochs * seeds))
    (low, train), (high, test) = (_losses(victim, rows) for rows in (inside, outside))
    above = (high[:, None] > low).double().mean() + (high[:, None] == low).double().mean() / 2
    return float(above), train, test


def _losses(victim: Victim, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the loss of each example, and the accuracy."""
    with torch.no_grad():
        scores = victim.scores(victim.inputs[rows])
        targets = victim.targets[rows]
        losses = [float(victim.loss(score[None], target[None])) for score, target in zip(scores, targets, strict=True)]
    return torch.tensor(losses), float((scores.argmax(dim=1) == targets).double().mean())


def _mechanism(victim: Victim) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns a function that gives the private gradient of a batch."""
    ops = HostOps()
    mechanism = Mechanism(Privacy(clip=1.0, noise_multiplier=1.0, unit="example", batch=float(BATCH)), ops)
    specs = {name: TensorSpec(name, *ops.describe(p)) for name, p in victim.parameters.items()}

    def one(parameters: dict[str, torch.Tensor], example: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return victim.loss(functional_call(victim.model, parameters, (example[None],)), target[None])

    each = vmap(grad(one), in_dims=(None, 0, 0))

    def private(inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        raw = each({name: p.detach() for name, p in victim.parameters.items()}, inputs, targets)
        return mechanism.release(raw, specs, StepInfo(step=0, rank=0, size=1, divisor=1))

    return private
