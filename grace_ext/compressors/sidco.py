from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..parts.part import knob
from . import register
from .forms.sparse import Selecting, index_knob, kept, ratio_knob, values_knob


def exponential(mean: float, ratio: float) -> float:
    """Returns what a fraction `ratio` of an exponential distribution exceeds."""
    return -mean * math.log(ratio)


def pareto(mean: float, variance: float, ratio: float) -> float:
    """Returns the same for the generalized Pareto distribution with these moments."""
    if variance <= 1e-12 * mean * mean:
        return mean  # all are equal
    spread = mean * mean / variance
    scale, shape = mean / 2 * (spread + 1), (spread - 1) / 2
    return -scale * math.expm1(shape * math.log(ratio)) / shape if shape else exponential(scale, ratio)


def gamma(mean: float, mean_log: float, ratio: float) -> float:
    """Returns the same, approximately, for the gamma distribution; not positive if the approximation fails."""
    gap = math.log(mean) - mean_log
    if gap < 1e-9:
        return 0.0  # all are equal
    shape = (3 - gap + math.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    return -mean / shape * (math.log(ratio) + math.lgamma(shape))


@register("sidco")
@dataclass(frozen=True)
class SIDCo(Selecting):
    """Sends the elements above a threshold that a fitted distribution gives, so that about k are sent without any sorting.

    C(x)_j = x_j if |x_j| >= t, else 0. With k = max(1, ceil(ratio * d)), m the number of elements that are not zero and r = k / m, t is
    computed in M stages. The first inverts the tail of the distribution of |x| at r_1 = first_ratio (at r itself if M = 1 or
    r >= first_ratio). Each further one inverts that of the exceedances |x_j| - min, over the |x_j| >= t so far, at (r / r_1)^(1 / (M - 1)),
    and adds the result to t. The distributions, with mean u and variance v of what is fitted:
        exponential  u ln(1 / r)
        pareto       a (1 - r^c) / c,  a = u/2 (u^2/v + 1),  c = (u^2/v - 1) / 2
        gamma        first stage -b (ln r + lnGamma(s)),  b = u / s,  s = (3 - q + sqrt((q - 3)^2 + 24 q)) / (12 q),  q = ln u - mean ln|x|,
                     a closed form for s near 1 (pareto if it is not positive); pareto in the later stages
    Every `every` calls, M follows the mean of sent / k: one stage fewer above 1.2, one more below 0.8, 1 <= M <= ceil(log2(1 / ratio)).
    x: float[d] -> values float32[n] (or 16 bits) and their positions; n is at least 1 if x != 0, and may be any number up to d. If all
    magnitudes are equal, no threshold divides them, and all are sent. If m <= k, all elements that are not zero are sent.
    Wire: as topk with k = n, and 8 bytes of counts; at most all values without positions. Biased: pair with 'residual'.
    State: `sidco_stages`, float32[3] per tensor: M, calls since M was last adapted, sum of sent / k. 'exponential' is the cheapest, and
    right for tails up to Laplace's (with heavier ones it sends less than k: 0.4 k for Student's t with 3 degrees of freedom); 'pareto'
    follows heavy tails; 'gamma' needs logarithms.
    Source: Abdelmoniem et al. 2021. The distributions are fitted to the elements that are not zero, which the paper does not say; the
    authors' code has one controller for all tensors.
    """

    borrowed_state: ClassVar[tuple[str, ...]] = ("sidco_stages",)
    ratio: float = ratio_knob()
    distribution: str = knob("exponential", "fitted law of the magnitudes", choices=("exponential", "pareto", "gamma"), headline=True)
    stages: int = knob(3, "stages at the first step; the controller changes them", low=1, high=64)
    first_ratio: float = knob(0.25, "fraction that the first of several stages leaves", above=0, high=0.999)
    every: int = knob(5, "calls between two decisions of the controller", low=1, high=10000)
    values: str = values_knob()
    index: str = index_knob()

    def typical(self, d):
        return kept(self.ratio, d)

    def init(self, ops, spec, info):
        return {"sidco_stages": ops.upload(np.array([min(self.stages, self._most_stages()), 0, 0], np.float32))}

    def _most_stages(self) -> int:
        return max(1, math.ceil(-math.log2(self.ratio) - 1e-9))

    def select(self, ops, x, spec, info, state):
        k, control = kept(self.ratio, spec.size), ops.host(state["sidco_stages"])
        magnitudes = abs(x[x != 0])
        found = ops.positions(x != 0)
        if len(found) > k:
            found = ops.at_least(x, self._threshold(ops, x, magnitudes, k / len(found), int(control[0])))
        return found, {"sidco_stages": ops.upload(self._adapted(control, len(found) / k))}

    def swept(self, ops, grad, feedback, spec, info, state):
        if self.distribution != "exponential":
            return super().swept(ops, grad, feedback, spec, info, state)
        if (done := ops.compensate_stats(feedback, grad)) is None:
            return None
        x, total, count, largest = done
        if count <= (k := kept(self.ratio, spec.size)):
            return x, None
        shares = self._shares(k / count, int(ops.host(state["sidco_stages"])[0]))
        threshold = float(np.float32(min(exponential(total / count, shares[0]), largest)))
        if len(shares) > 1:
            rest, least = ops.magnitudes_above(x, threshold)
            for share in shares[1:]:
                tail = exponential(ops.total_above(rest, least) / len(rest), share)
                threshold = float(np.float32(min(threshold + tail, largest)))
                rest, least = ops.magnitudes_above(rest, threshold)
        return ops.take_out(feedback, x, threshold)

    def among(self, ops, values, spec, info, state):
        control, k = ops.host(state["sidco_stages"]), kept(self.ratio, spec.size)
        return np.ones(len(values), bool), {"sidco_stages": ops.upload(self._adapted(control, len(values) / k))}

    def _shares(self, ratio: float, stages: int) -> list[float]:
        """Returns the fraction that each stage leaves of what the one before left."""
        several = stages > 1 and ratio < self.first_ratio
        return [self.first_ratio, *[(ratio / self.first_ratio) ** (1 / (stages - 1))] * (stages - 1)] if several else [ratio]

    def _threshold(self, ops, x, magnitudes, ratio, stages) -> float:
        shares, largest = self._shares(ratio, stages), ops.largest(magnitudes)
        # Summed with the zeros, which change nothing but the order: the kernel of `swept` does not leave them out.
        total = float(ops.block_norms(x, len(x), 1)[0])
        threshold = float(np.float32(min(self._tail(ops, magnitudes, total, shares[0], first=True), largest)))
        return self._later(ops, magnitudes[magnitudes >= threshold], shares[1:], threshold, largest)

    def _later(self, ops, rest, shares, threshold, largest) -> float:
        """Returns the threshold after the later stages, given the magnitudes that the first one left."""
        for share in shares:
            excess = rest - rest.min()
            threshold = float(np.float32(min(threshold + self._tail(ops, excess, ops.total(excess), share, first=False), largest)))
            rest = rest[rest >= threshold]
        return threshold

    def _tail(self, ops, excess, total: float, ratio, *, first) -> float:
        """Returns a value that about a fraction `ratio` of the excess exceeds. total: its sum."""
        count = len(excess)
        mean = total / count
        if not mean:
            return 0.0
        if self.distribution == "exponential":
            return exponential(mean, ratio)
        if self.distribution == "gamma" and first:
            tail = gamma(mean, ops.total(ops.log(excess)) / count, ratio)
            if tail > 0:
                return tail
        return pareto(mean, float(ops.block_norms(excess, count, 2)[0]) ** 2 / count - mean * mean, ratio)

    def _adapted(self, control, share) -> np.ndarray:
        """Returns the controller's state after one more call, which sent `share` times k elements."""
        stages, calls, total = int(control[0]), int(control[1]) + 1, float(control[2]) + share
        if calls >= self.every:
            mean = total / calls
            stages = min(max(stages + (mean < 0.8) - (mean > 1.2), 1), self._most_stages())
            calls, total = 0, 0.0
        return np.array([stages, calls, total], np.float32)
