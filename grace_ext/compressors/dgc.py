from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..parts import rng
from ..parts.part import knob
from . import register
from .forms.sparse import Selecting, index_knob, kept, largest, ratio_knob, values_knob

#: The most elements of a sample that are to lie above the threshold, which is then off by about 1 / sqrt(400).
MOST_PER_KEPT = 400


def stride(d: int, samples: int) -> int:
    """Returns the step that takes at least `samples` of d elements. It is odd, and, if it is large, a multiple of 32 plus 1, so that it
    does not walk along the columns of a matrix whose rows are a round number long."""
    step = max(1, d // samples)
    return step - (step - 1) % 32 if step > 32 else step - (step + 1) % 2


@register("dgc")
@dataclass(frozen=True)
class DGC(Selecting):
    """Sends about k elements of largest magnitude: those above a threshold that is estimated on a sample.

    k = max(1, ceil(ratio * d)). Every s-th element from a random start is sampled: at least sample_ratio d of them, but no fewer than
    2 / ratio (all, if there are no more) and no more than 400 / ratio, which place the threshold within 5%. The threshold t is the
    smallest magnitude among the top `ratio` of the sample;  C(x)_j = x_j if |x_j| >= t, else 0. If more than upper * k elements reach t,
    the k LARGEST of them are sent (resample=True), or t is multiplied by `upper` (resample=False). If fewer than lower * k do, t is
    multiplied by `lower`. t is changed at most `max_iters` times. If the number is then still outside [lower k, upper k], or t is zero
    (most of the sample is zero), the k largest elements that are not zero are sent instead.
    x: float[d] -> values float32[m] (or 16 bits) and their positions, lower k <= m <= upper k; less only if no more are non-zero.
    Wire: as topk with k = m, and 8 bytes of counts. Contraction: delta = lower k / d. Biased: pair with 'residual' or memory 'dgc'.
    Cheaper than topk, which reads every element twice. A larger sample finds a better threshold and costs more; a tight [lower, upper]
    keeps the size near k and costs more passes. Each rank draws its own start of the sample; sampling='shared' makes it the same
    on all ranks (the thresholds still differ, as the gradients do).
    Source: Lin et al. 2018 (deep gradient compression). If the threshold is zero, GRACE sends the whole tensor with 8-byte indices; the
    authors' code keeps the first k of too many, not the largest. Both are corrected here.
    """

    ratio: float = ratio_knob()
    sample_ratio: float = knob(0.01, "fraction of the elements that is sampled; more gives a better threshold", above=0, high=1)
    upper: float = knob(1.3, "most elements that are sent, as a multiple of k", low=1, high=1000)
    lower: float = knob(0.8, "fewest elements that are sent, as a multiple of k", above=0, high=1)
    max_iters: int = knob(10, "most changes of the threshold; 0: only the sample's, else the exact k largest", low=0, high=1000)
    resample: bool = knob(True, "if too many reach the threshold, send the k largest; False: raise the threshold")
    sampling: str = knob("private", "random start of the sample: each rank's own, or one for all ranks", choices=("private", "shared"))
    values: str = values_knob()
    index: str = index_knob()

    def most(self, d):
        return min(d, math.floor(self.upper * kept(self.ratio, d) + 1e-9))

    def _least(self, d):
        return math.ceil(self.lower * kept(self.ratio, d) - 1e-9)

    def typical(self, d):
        return kept(self.ratio, d)

    def delta(self, d):
        return self._least(d) / d if self.values == "fp32" else None

    def _sampled(self, ops, spec, info) -> slice:
        """Returns the slice of the elements that are sampled."""
        wanted = max(self.sample_ratio * spec.size, 2 / self.ratio)
        step = stride(spec.size, math.ceil(min(wanted, MOST_PER_KEPT / self.ratio)))
        key = (info.private_key if self.sampling == "private" else info.shared_key)(spec.name, "dgc")
        return slice(int(rng.words(key, 1)[0]) * step >> 32, None, step)

    def _suggested(self, ops, sample) -> float:
        """Returns the threshold that a sample suggests."""
        return float(abs(sample[ops.top_k(sample, kept(self.ratio, len(sample)))]).min())

    def swept(self, ops, grad, feedback, spec, info, state):
        sample = ops.sample(feedback, grad, self._sampled(ops, spec, info))
        if not ops.all_finite(sample):  # it would suggest no threshold
            return None
        return ops.sweep(feedback, grad, self._suggested(ops, sample))

    def among(self, ops, values, spec, info, state):
        k, most = kept(self.ratio, spec.size), self.most(spec.size)
        if len(values) < self._least(spec.size) or (len(values) > most and self.max_iters and not self.resample):
            return None
        return (np.ones(len(values), bool) if len(values) <= most else largest(ops, values, k)), state

    def select(self, ops, x, spec, info, state):
        k, least, most = kept(self.ratio, spec.size), self._least(spec.size), self.most(spec.size)
        threshold = self._suggested(ops, ops.copy(x[self._sampled(ops, spec, info)]))
        found = ops.at_least(x, threshold)
        for _ in range(self.max_iters):
            many, few = len(found) > most, len(found) < least
            if not threshold or not (few or many) or (many and self.resample):
                break
            threshold = float(np.float32(min(threshold * (self.lower if few else self.upper), 3e38)))
            found = ops.at_least(x, threshold)
        if len(found) < least:
            found = ops.top_k(x, k)
        elif len(found) > most:
            found = found[ops.top_k(x[found], k)]
        return found[x[found] != 0], state
