from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.requests import Together
from . import register
from .forms.sparse import Selecting, index_knob, kept, ratio_knob, values_knob


def choose(asked):
    """Returns, for every tensor (ops, x, ratio) in the order of the bucket, the positions of its elements among the largest of all."""
    ops, _, ratio = asked[0]
    k = kept(ratio, sum(len(x) for _, x, _ in asked))
    tensors = [x for _, x, _ in reversed(asked)]  # a bucket holds its parameters in reverse order
    own = [ops.top_k(x, min(k, len(x))) for x in tensors]  # nothing else can be among the largest of all
    chosen = ops.top_k(ops.concat([x[positions] for x, positions in zip(tensors, own, strict=True)]), k)
    bounds = np.cumsum([0, *map(len, own)])
    cuts = np.searchsorted(ops.host(chosen), bounds).tolist()
    return [own[i][chosen[cuts[i] : cuts[i + 1]] - int(bounds[i])] for i in range(len(own))][::-1]


@register("global_topk")
@dataclass(frozen=True)
class GlobalTopK(Selecting):
    """Sends the k elements of largest magnitude of the whole model, however many of them each tensor has.

    C(x)_j = x_j for j in the k largest |x_j| of all tensors together, else 0;  k = max(1, ceil(ratio * D)), D = elements of the model;
    exactly k; ties go to the parameter that was registered first, then to the lowest position.
    x: float[d] -> values float32[m] (or 16 bits) and their positions in the tensor, 0 <= m <= d, sum of m over the tensors = k.
    Wire: as topk with k = m, and 8 bytes of counts per tensor. The whole model is contracted with delta = k / D; a single tensor is not,
    and may send nothing at all for a long time: pair with 'residual'.
    Every gradient is needed before the first can be sent, so nothing overlaps the backward pass, and all gradients travel in one bucket
    (the wrapper ensures this). 'threshold' makes the same kind of selection without waiting. A tensor that is compressed by itself is
    treated as a whole model.
    Source: Lin et al. 2018; Sahu et al. 2021 (entire-model Top-k).
    """

    whole_model: ClassVar[bool] = True
    ratio: float = ratio_knob()
    values: str = values_knob()
    index: str = index_knob()

    def typical(self, d):
        return kept(self.ratio, d)

    def sends_dense(self, spec):
        return False  # every tensor takes part in the choice

    def prepare(self, ops, x, spec, info):
        positions = yield Together((ops, x, self.ratio), choose)
        bound = copy.copy(self)
        object.__setattr__(bound, "_positions", positions)  # what `select` returns, for this x only
        return bound

    def select(self, ops, x, spec, info, state):
        bound = getattr(self, "_positions", None)
        return ops.top_k(x, kept(self.ratio, spec.size)) if bound is None else bound, state
