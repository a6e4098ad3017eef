from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ParameterError, UnsupportedError
from ..parts.part import knob
from ..parts.tensor import StepInfo
from . import register
from .forms.sparse import Selecting, index_knob, kept, values_knob


@register("threshold")
@dataclass(frozen=True)
class Threshold(Selecting):
    """Sends every element whose magnitude reaches a fixed threshold, however many there are (hard threshold).

    C(x)_j = x_j if |x_j| >= threshold, else 0.  x: float[d] -> values float32[m] (or 16 bits) and their positions, 0 <= m <= d.
    An absolute compressor: ||x - C(x)||^2 <= threshold^2 d for every x. Biased: pair with 'residual'.
    Wire: as topk with k = m, and 8 bytes of counts. If that is not smaller than all values without positions, all values are sent.
    The threshold is in units of the gradient (plus residual). One that is too low sends nearly everything, one that is too high
    sends nothing for many steps. `like_topk` gives a rule that works (the paper's appendix D): 1 / (2 sqrt(k)), k = max(1, ceil(like_topk
    * d)) for the d elements of the whole model; so kappa^2 = d / (4k) for all of it. like_topk=0.001 is 4.73e-3 for ResNet-18 on CIFAR-10
    (d = 11,173,962). d counts the parameters that one exchange has (of one optimizer, hook or LocalSGD), also those that other ranks hold
    (FSDP) or that a policy sends in another way. If an exchange has a part of the model only, as in pipeline parallelism, it follows from
    that part: then give the threshold itself.
    Source: Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization); Strom 2015.
    """

    merges: ClassVar[bool] = True
    threshold: float | None = knob(
        None, "smallest magnitude that is sent, in units of the gradient; None: 0.01, or by like_topk", low=0, headline=True, kind=float
    )
    values: str = values_knob()
    index: str = index_knob()
    like_topk: float | None = knob(
        None, "ratio of the Top-k whose k for the whole model gives the threshold 1 / (2 sqrt(k))", above=0, high=1, kind=float
    )

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is None and self.like_topk is None:
            object.__setattr__(self, "threshold", 0.01)
        if self.threshold is not None and self.like_topk is not None:
            raise ParameterError(f"threshold: threshold={self.threshold} and like_topk={self.like_topk} both say what is sent: give one")

    def sends_dense(self, spec):
        return False  # only the values decide how much is sent

    def kappa(self, d):
        return self.threshold * d**0.5 if self.threshold is not None and self.values == "fp32" else None

    def _least(self, info: StepInfo) -> float:
        """Returns the smallest magnitude that is sent. Raises UnsupportedError if that needs the size of the model, which is not known."""
        if self.like_topk is None:
            assert self.threshold is not None
            return self.threshold
        if not info.elements:
            raise UnsupportedError(
                f"{self}: the threshold is 1 / (2 sqrt(k)) with k = {self.like_topk:g} times the elements of the whole model, and here one "
                f"tensor is compressed of a model that is not known: give the number instead, such as "
                f"threshold(threshold={self._rule(1_000_000):.3g}) for a model of 1,000,000 elements"
            )
        return self._rule(info.elements)

    def _rule(self, elements: int) -> float:
        return 1 / (2 * math.sqrt(kept(self.like_topk or 1.0, elements)))

    def swept(self, ops, grad, feedback, spec, info, state):
        return ops.sweep(feedback, grad, self._least(info))

    def take_each(self, ops, grad, feedback, ends, most, info):
        swept = ops.sweep(feedback, grad, self._least(info))
        return swept and (swept[0], *swept[1])

    def among(self, ops, values, spec, info, state):
        return np.ones(len(values), bool), state

    def select(self, ops, x, spec, info, state):
        return ops.at_least(x, self._least(info)), state
