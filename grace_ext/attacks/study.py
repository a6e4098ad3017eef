"""Runs attacks on batches for several specs, and measures what came back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..composition import making
from ..errors import ParameterError, UnsupportedError
from . import inversion
from .inversion import Tick
from .observer import Leak, ObservedRank
from .victim import Victim

#: A PSNR above this is rounding error.
MOST_DB = 100.0
#: The learning rate that memories are told of, for those that ask; the weights stand still.
RATE = 0.1
GUESS = "guess"


@dataclass(frozen=True)
class Recovered:
    """Tells how near some recovered batches are to the originals: means over all images. attack: 'guess' stands for other images of the
    data, drawn at random. labels: the share that is right, None if the attacker was given them. ssim: None if there are no images."""

    spec: str
    attack: str
    attacker: str
    mse: float
    psnr: float
    ssim: float | None
    labels: float | None
    inputs: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """Says what to attack: how many batches of how many examples, and at which step, after steps on other batches. The weights stand still,
    so that all specs are attacked on the same gradients."""

    victim: Victim
    attacks: Sequence[str]
    images: int = 4
    batch: int = 1
    step: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        needed = self.step * self.batch * self.batches
        if needed > len(self.victim.inputs):
            raise ParameterError(
                f"{self.batches} batches of {self.batch} at step {self.step} need {needed} examples, and there are "
                f"{len(self.victim.inputs)}: ask for fewer images, a smaller batch or an earlier step"
            )

    @property
    def batches(self) -> int:
        return -(-self.images // self.batch)

    def chosen(self, number: int, step: int) -> torch.Tensor:
        """Returns the numbers of the examples of a batch, at a step from 1 to `step`; those of the last step are the first of the data."""
        start = self.batch * (number + (self.step - step) * self.batches)
        return torch.arange(start, start + self.batch)


def run(plan: Plan, specs: Sequence[str], tick: Tick) -> Iterator[Recovered]:
    """Yields one result per spec, attack and attacker, and one for guessing. tick: called with the share of one attack that is done."""
    originals = torch.cat([plan.victim.inputs[plan.chosen(number, plan.step)] for number in range(plan.batches)])
    for spec in specs:
        leaks = [leak_of(plan, spec, number) for number in range(plan.batches)]
        for attack in plan.attacks:
            before = None
            for attacker in inversion.ATTACKERS:
                if before is not None and not any(leak.says_more for leak in leaks):
                    tick(plan.batches)  # the same attack on the same values
                    found = before
                else:
                    found = [attacked(plan, leak, number, attack, attacker, tick) for number, leak in enumerate(leaks)]
                before = found
                inputs = torch.cat([batch for batch, _ in found])
                right = [share for _, share in found if share is not None]
                labels = sum(right) / len(right) if right else None
                yield Recovered(spec, attack, attacker, *compared(plan.victim, originals, inputs), labels, inputs)
    generator = torch.Generator().manual_seed(plan.seed)
    others = plan.victim.inputs[torch.randint(len(plan.victim.inputs), (len(originals),), generator=generator)]
    yield Recovered("-", GUESS, "-", *compared(plan.victim, originals, others), None, others)


def leak_of(plan: Plan, spec: making.Spec, number: int) -> Leak:
    """Returns what a rank gives away at the step that is attacked."""
    rank, leak = ObservedRank(spec), None
    for step in range(1, plan.step + 1):
        chosen = plan.chosen(number, step)
        gradients = plan.victim.gradients_of_examples if rank.per_example else plan.victim.gradients
        leak = rank.step(gradients(plan.victim.inputs[chosen], plan.victim.targets[chosen]), lr=RATE)
    assert leak is not None
    return leak


def attacked(plan: Plan, leak: Leak, number: int, attack: str, attacker: str, tick: Tick) -> tuple[torch.Tensor, float | None]:
    """Attacks one batch. Returns (what it recovered, in the order of the originals that it resembles most; the share of right labels)."""
    victim, chosen = plan.victim, plan.chosen(number, plan.step)
    truth, targets = victim.inputs[chosen], victim.targets[chosen]
    found = inversion.labels_of(victim, leak, plan.batch)
    share = None if found is None else common(found.tolist(), targets.tolist()) / plan.batch
    labels = targets if found is None else found
    target, generator = inversion.target_of(leak, attacker), torch.Generator().manual_seed(1000 * plan.seed + number)
    if attack == "analytic":
        inputs = inversion.analytic(victim, target, leak, plan.batch)
        tick(1)
    else:
        inputs = getattr(inversion, attack)(victim, target, labels, generator, tick)
    return in_order(truth, inputs), share


def common(found: list[Any], truth: list[Any]) -> int:
    """Returns how many elements two lists have in common, each as often as it occurs in both."""
    return sum(min(found.count(value), truth.count(value)) for value in set(truth))


def in_order(truth: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Returns, for each original, the candidate that the assignment of the least squared error gives it; zeros if there are too few."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-image

    if len(inputs) < len(truth):
        inputs = torch.cat([inputs, truth.new_zeros(len(truth) - len(inputs), *truth.shape[1:])])
    costs = torch.cdist(truth.flatten(1).double(), inputs.flatten(1).double()).square()
    return inputs[torch.from_numpy(linear_sum_assignment(costs.numpy())[1])]


def compared(victim: Victim, truth: torch.Tensor, inputs: torch.Tensor) -> tuple[float, float, float | None]:
    """Returns the means of the squared error, the PSNR in dB (100 at most) and the structural similarity over some inputs."""
    low, high = victim.box
    errors = [float((a.double() - b.double()).square().mean()) for a, b in zip(truth, inputs, strict=True)]
    ratios = [min(MOST_DB, 20 * math.log10(high - low) - 10 * math.log10(max(error, 1e-300))) for error in errors]
    alike = [similarity(a, b, high - low) for a, b in zip(truth, inputs, strict=True)]
    mean = None if None in alike else sum(filter(None, alike)) / len(alike)
    return sum(errors) / len(errors), sum(ratios) / len(ratios), mean


def similarity(truth: torch.Tensor, found: torch.Tensor, span: float) -> float | None:
    """Returns the structural similarity of two images, [channels, height, width]; None for other inputs, and for images below 7 x 7."""
    if truth.ndim != 3 or min(truth.shape[1:]) < 7:
        return None
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise UnsupportedError("to compare images needs scikit-image: pip install 'grace_ext[privacy]'") from None
    return float(structural_similarity(truth.numpy(), found.numpy(), data_range=span, channel_axis=0))
