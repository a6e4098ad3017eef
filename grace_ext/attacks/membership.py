"""Infers whether an example was trained on, from the loss: members of the training data have a lower one (Yeom et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..composition import making
from .inversion import Tick
from .observer import ObservedRank
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


#: Dense gradients, each example of which is clipped to 1 and gets noise of deviation 1.
PRIVATE = f"gaussian(clip=1.0, noise_multiplier=1.0, unit='example', batch={BATCH}.0) | none"


def infer(
    spec: making.Spec, make: Callable[[int], Victim], tick: Tick, *, seeds: Sequence[int] = (0, 1, 2), members: int = 500, epochs: int = 60
) -> Membership:
    """Trains a model on `members` examples with the spec, so long that it knows them by heart, and tells them by their losses. Returns
    means over seeds."""
    found = [_once(spec, make(seed), seed, members, epochs, lambda done: tick(done / len(seeds))) for seed in seeds]
    return Membership(str(spec), *(sum(column) / len(seeds) for column in zip(*found, strict=True)))


def _once(spec: making.Spec, victim: Victim, seed: int, members: int, epochs: int, tick: Tick) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(seed)
    members = min(members, len(victim.inputs) // 2)
    order = torch.randperm(len(victim.inputs), generator=generator)
    inside, outside = order[:members], order[members : 2 * members]
    rank = ObservedRank(spec)
    gradients = victim.gradients_of_examples if rank.per_example else victim.gradients
    for _ in range(epochs):
        for chosen in inside[torch.randperm(members, generator=generator)].split(BATCH):
            leak = rank.step(gradients(victim.inputs[chosen], victim.targets[chosen]), lr=RATE)
            with torch.no_grad():
                for name, parameter in victim.parameters.items():
                    parameter.sub_(leak.decoded[name], alpha=RATE)
        tick(1 / epochs)
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
