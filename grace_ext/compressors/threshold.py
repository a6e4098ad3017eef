from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.part import knob
from . import register
from .forms.sparse import Selecting, index_knob, values_knob


@register("threshold")
@dataclass(frozen=True)
class Threshold(Selecting):
    """Sends every element whose magnitude reaches a fixed threshold, however many there are (hard threshold).

    C(x)_j = x_j if |x_j| >= threshold, else 0.  x: float[d] -> values float32[m] (or 16 bits) and their positions, 0 <= m <= d.
    An absolute compressor: ||x - C(x)||^2 <= threshold^2 d for every x. Biased: pair with 'residual'.
    Wire: as topk with k = m, and 8 bytes of counts. If that is not smaller than all values without positions, all values are sent.
    The threshold is in units of the gradient (plus residual). One that is too low sends nearly everything, one that is too high
    sends nothing for many steps; a rule that works is 1 / (2 sqrt(k)), k = elements per step that Top-k would send of the whole model.
    Source: Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization); Strom 2015.
    """

    merges: ClassVar[bool] = True
    threshold: float = knob(0.01, "smallest magnitude that is sent, in units of the gradient", low=0, headline=True)
    values: str = values_knob()
    index: str = index_knob()

    def sends_dense(self, spec):
        return False  # only the values decide how much is sent

    def kappa(self, d):
        return self.threshold * d**0.5 if self.values == "fp32" else None

    def swept(self, ops, grad, feedback, spec, info, state):
        return ops.sweep(feedback, grad, self.threshold)

    def take_each(self, ops, grad, feedback, ends, most):
        swept = ops.sweep(feedback, grad, self.threshold)
        return swept and (swept[0], *swept[1])

    def among(self, ops, values, spec, info, state):
        return np.ones(len(values), bool), state

    def select(self, ops, x, spec, info, state):
        return ops.at_least(x, self.threshold), state
