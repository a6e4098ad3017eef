"""Defines `Privacy`, the settings of differential privacy: `gaussian(...)` in front of a spec, `privacy=` of the wrappers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import ParameterError, UnsupportedError, shown
from ..parts.part import Part, knob
from ..parts.registry import mechanisms
from . import accounting

if TYPE_CHECKING:
    import numpy as np

BATCH_NORM = (
    "the model has {} layers of batch normalization ({}, ...), which mix the examples of a batch and keep their means and variances in the "
    "model, without noise: no clip bounds what one example does to them. "
)


@mechanisms.register("gaussian")
@dataclass(frozen=True)
class Privacy(Part):
    """Clips what one unit (an example, or a whole rank) contributes to a rank's gradient, and adds normal noise, before anything is
    compressed or sent.

    p = clip(g) + noise_multiplier * clip * z, z ~ N(0, 1), is all that the memory, the compressor, policies, metrics and the other ranks
    get to see: whatever they make of it costs no further epsilon. The noise comes from the operating system's randomness, never from
    `seed`. docs/privacy.md says what is guaranteed.
    """

    kind: ClassVar[str] = "mechanism"

    clip: float = knob(1.0, "the largest L2 norm, over all parameters, that one unit contributes", above=0, high=1e30, headline=True)
    noise_multiplier: float = knob(1.0, "the noise's standard deviation, in units of clip", low=0, high=1e6, headline=True)
    sample_rate: float = knob(1.0, "the probability that an example takes part in a step (Poisson sampling)", above=0, high=1)
    unit: str = knob("rank", "what is protected: one rank's whole gradient, or each example", choices=("rank", "example"))
    trust: str = knob(
        "peers", "'peers': every rank's message is private by itself; 'sum': only the ranks' sum is", choices=("peers", "sum")
    )
    support: float = knob(1.0, "the share of elements that is kept, drawn anew per step, the same on all ranks", above=0, high=1)
    batch: float | None = knob(None, "the expected number of examples per rank and step, by which sums are divided", above=0, kind=float)

    def __post_init__(self) -> None:
        if not isinstance(self.support, (int, float)):
            raise ParameterError(
                f"gaussian: support is the share of elements that is kept, a number in (0, 1], got {shown(self.support)}. A support that "
                "depends on the data (topk) would itself say something about them; a compressor behind the noise may: 'gaussian | topk'"
            )
        super().__post_init__()
        if self.unit == "rank" and (self.sample_rate != 1 or self.batch is not None):
            raise ParameterError(
                "gaussian: sample_rate and batch are for unit='example'; with unit='rank' every rank takes part in every step, and its "
                "whole gradient is clipped once. Leave them out, or pass unit='example'"
            )
        if self.unit == "example" and self.batch is None:
            raise ParameterError(
                "gaussian: unit='example' needs batch, the expected number of examples per rank and step (sample_rate times the examples "
                "of a rank): sums are divided by it, and not by the number that happened to be drawn, which the data decide"
            )

    def epsilon(self, delta: float, steps: int) -> float:
        """Returns an upper bound of epsilon after this many steps, by dp-accounting's PLD accountant.

        Neighbouring data differ by one unit that is there or not. Raises UnsupportedError without dp-accounting, ParameterError for a
        delta outside (0, 1)."""
        return accounting.epsilon(self.noise_multiplier, self.sample_rate, steps, delta)

    def noise_for(self, epsilon: float, delta: float, steps: int) -> float:
        """Returns the noise multiplier that this many steps of this sample_rate need for `epsilon`, at most 0.001 above the smallest."""
        return accounting.noise_for(epsilon, self.sample_rate, steps, delta)

    def sample(self, examples: int) -> np.ndarray:
        """Returns the numbers of the examples of one step, out of 0 ... examples - 1: each is drawn with probability sample_rate,
        independently, by the operating system's randomness, as the accounting supposes. There may be none; step() must be called then,
        too."""
        from .noise import Noise  # which needs numpy

        return Noise().chosen(examples, self.sample_rate)


def refuse(privacy: Privacy | None, wrapper: str) -> None:
    """Raises UnsupportedError if there is privacy, for a wrapper that does not make gradients private."""
    if privacy is not None:
        raise UnsupportedError(
            f"{wrapper} does not make gradients private, so '{privacy} |' in front of the spec cannot be kept: use a way of training that "
            "does (docs/privacy.md), such as hvd.DistributedOptimizer(privacy=...), or leave it out"
        )


def check_protects_ranks(privacy: Privacy | None, wrapper: str) -> None:
    """Raises UnsupportedError if the unit is an example, for a wrapper that sees whole gradients of ranks only."""
    if privacy is not None and privacy.unit == "example":
        raise UnsupportedError(
            f"{wrapper} gets one gradient per rank, in which examples cannot be clipped one by one any more: unit='example' works with "
            "hvd.DistributedOptimizer. Use unit='rank' here"
        )
