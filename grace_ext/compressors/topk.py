from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register
from .forms.sparse import Selecting, index_knob, kept, largest, ratio_knob, values_knob


@register("topk")
@dataclass(frozen=True)
class TopK(Selecting):
    """Sends the k elements of largest magnitude of each tensor.

    C(x)_j = x_j for j in the k largest |x_j|, else 0;  k = max(1, ceil(ratio * d)); ties go to the lowest position.
    x: float[d] -> values float32[k] (or 16 bits), positions coded (Elias-Fano).  Contraction delta = k/d, biased: pair with 'residual'.
    Wire: 4k bytes of values and about k (log2(d/k) + 2) / 8 of positions; 5.07 bytes per sent element at 1%. Fixed size.
    Source: Aji and Heafield 2017; Stich et al. 2018. GRACE sends 12 bytes per sent element, this sends 5.
    """

    exactly: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    largest: ClassVar[bool] = True
    ratio: float = ratio_knob()
    values: str = values_knob()
    index: str = index_knob()

    def most(self, d):
        return kept(self.ratio, d)

    def delta(self, d):
        return kept(self.ratio, d) / d if self.values == "fp32" else None

    def swept(self, ops, grad, feedback, spec, info, state):
        return ops.sweep_for(feedback, grad, kept(self.ratio, spec.size))

    def take_each(self, ops, grad, feedback, ends, most, info):
        if (x := ops.compensate(feedback, grad)) is None:
            return None
        positions = ops.largest_each(x, ends, most)
        values = x[positions]
        if feedback.residual is not None:
            x[positions] = 0
        return x, positions, values

    def among(self, ops, values, spec, info, state):
        k = kept(self.ratio, spec.size)
        return (largest(ops, values, k), state) if len(values) >= k else None

    def select(self, ops, x, spec, info, state):
        return ops.top_k(x, kept(self.ratio, spec.size)), state
