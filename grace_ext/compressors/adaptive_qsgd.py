"""QSGD whose number of levels follows the aggregated gradient, which all ranks know alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ParameterError, PayloadError
from ..parts.field import Field
from ..parts.part import knob
from . import register
from .qsgd import _NormQuantizer, bucket_knob, code_bytes

#: Elements that are worked on at a time where several operations look at them.
MOMENTS_PIECE = 1 << 16


class _Adaptive(_NormQuantizer):
    """Shared: the levels are in the state, which changes with the aggregate only, and travel in the payload, so decoding needs no state."""

    levels: int
    max_levels: int

    def __post_init__(self):
        super().__post_init__()
        if self.levels > self.max_levels:
            raise ParameterError(f"{self.name}: levels={self.levels} is more than max_levels={self.max_levels}")

    def fields(self, spec):
        return (
            Field("levels", "uint16", 1),
            self.norms_field(spec),
            Field("codes", "uint8", code_bytes(spec.size, self.max_levels), variable=True),
        )

    def _levels_now(self, ops, state):
        """(s, its wire form)."""
        s = int(state[self.name][0])
        return s, ops.upload(np.array([s], "<u2").view(np.uint8))

    def compress(self, ops, x, spec, info, state):
        s, head = self._levels_now(ops, state)
        return (head, *self.quantize(ops, x, s, spec, info)), state

    def fused(self, ops, grad, feedback, spec, info, state):
        s, head = self._levels_now(ops, state)
        done = self.quantize_compiled(ops, grad, feedback, s, spec, info)
        return done and done._replace(payload=(head, *done.payload))

    def _levels_sent(self, ops, payload, spec) -> int:
        s = int(ops.host(payload[0]).copy().view("<u2")[0])
        if not 1 <= s <= self.max_levels:
            raise PayloadError(f"has {s} levels, at most {self.max_levels} are possible")
        if len(payload[2]) != code_bytes(spec.size, s):
            raise PayloadError(f"has {len(payload[2])} bytes of codes where {s} levels take {code_bytes(spec.size, s)}")
        return s

    def add_compiled(self, ops, total, payload, spec, first, divisor):
        return self.add_levels(ops, total, *payload[1:], self._levels_sent(ops, payload, spec), spec, first, divisor)

    def decompress(self, ops, payload, spec, info):
        return self.dequantize(ops, *payload[1:], self._levels_sent(ops, payload, spec), spec)


def start_knob(default: int):
    return knob(default, "levels above zero at the first step", low=1, high=32767, headline=True)


def most_knob():
    return knob(127, "most levels", low=1, high=32767)


@register("adaqs")
@dataclass(frozen=True)
class AdaQS(_Adaptive):
    """QSGD that doubles its levels when the gradient's mean has become small beside its spread.

    As qsgd, with s levels. After each step, from the aggregated gradient a: r = |mean(a)| / std(a), averaged over about `window` steps
    (R: a plain mean of the first `window`, then R <- R + (r - R) / window). Once `window` steps are seen, R0 = R; from then on, where
    R < R0 / 2:  s <- min(2 s, max_levels) and R0 <- R. An aggregate without spread, or not finite, changes nothing.
    x: float[d] -> s uint16, norms float32 a bucket, and d codes of 1 + ceil(log2(s + 1)) bits: 4.1 bits an element at first, 8.1 at most
    (and 6 bytes). Equal on all ranks, because a is. Unbiased, omega = min(B / s^2, sqrt(B) / s) as qsgd, at most that of `levels`.
    State: `adaqs`, float32[4]: s, R, R0 and steps seen, R0 = 0 until it is known. A larger window reacts later and to less noise.
    Source: Guo et al. 2020, who estimate the ratio by running moments; their exact rule for when to switch is not public, this is ours.
    """

    shared_state: ClassVar[tuple[str, ...]] = ("adaqs",)
    levels: int = start_knob(7)
    max_levels: int = most_knob()
    bucket: int = bucket_knob()
    window: int = knob(10, "steps that the ratio is averaged over", low=1, high=10**6)

    def omega(self, d):
        return self.variance(self.levels, d)

    def init(self, ops, spec, info):
        return {"adaqs": ops.upload(np.array([self.levels, 0, 0, 0], np.float32))}

    def on_aggregate(self, ops, aggregate, spec, info, state):
        ratio = _mean_to_spread(ops, aggregate)
        if ratio is None:
            return {}
        s, average, reference, seen = (float(v) for v in ops.host(state["adaqs"]))
        seen = min(seen + 1, self.window)
        average += (ratio - average) / seen
        if reference and average < reference / 2:
            s, reference = min(2 * s, self.max_levels), average
        elif not reference and seen == self.window:
            reference = average
        return {"adaqs": ops.upload(np.array([s, average, reference, seen], np.float32))}


def _mean_to_spread(ops, x) -> float | None:
    """|mean| / standard deviation; None where there is no spread to speak of."""
    mean = ops.total(x) / len(x)
    if not math.isfinite(mean):
        return None
    pieces = (ops.cast(x[at : at + MOMENTS_PIECE], "float64") - mean for at in range(0, len(x), MOMENTS_PIECE))
    spread = math.hypot(*(ops.block_norms(piece, len(piece), 2)[0] for piece in pieces)) / len(x) ** 0.5
    if not math.isfinite(spread) or spread <= 1e-6 * abs(mean):
        return None
    return abs(mean) / spread


@register("dqsgd")
@dataclass(frozen=True)
class DQSGD(_Adaptive):
    """QSGD with levels in proportion to the norm of the last aggregated gradient: large gradients are sent finely, small ones coarsely.

    As qsgd, with s = clamp(round(c ||a||_2), 1, max_levels) levels, a the last step's aggregate as a mean over ranks, and `levels` at the
    first step. `factor` is c, in levels per unit of the gradient's norm; by default c = levels / ||a|| of the first a that is not zero, so
    that bits are spent as the norm falls from there. An aggregate of zero, or not finite, changes nothing.
    x: float[d] -> s uint16, norms float32 a bucket, and d codes of 1 + ceil(log2(s + 1)) bits: 8.1 bits an element at first and at most
    (and 6 bytes), 2.1 at least. Equal on all ranks, because a is. Unbiased, omega <= sqrt(B), that of one level.
    State: `dqsgd`, float32[2]: s and c, 0 until it is known. A higher factor costs bits and adds less noise.
    Source: Yan et al. (DQ-SGD), by the description of Sahu et al. 2021; their closed form is not public, this one is ours.
    """

    shared_state: ClassVar[tuple[str, ...]] = ("dqsgd",)
    levels: int = start_knob(127)
    max_levels: int = most_knob()
    bucket: int = bucket_knob()
    factor: float = knob(0.0, "levels per unit of the aggregate's norm; 0: so that the first aggregate gets `levels`", low=0)

    def omega(self, d):
        return self.variance(1, d)

    def init(self, ops, spec, info):
        return {"dqsgd": ops.upload(np.array([self.levels, min(self.factor, 1e38)], np.float32))}

    def on_aggregate(self, ops, aggregate, spec, info, state):
        norm = float(ops.block_norms(aggregate, len(aggregate), 2)[0]) * info.divisor / info.size
        if not norm or not math.isfinite(norm):
            return {}
        factor = float(ops.host(state["dqsgd"])[1]) or min(self.levels / norm, 1e38)
        s = max(1, min(round(factor * norm), self.max_levels))
        return {"dqsgd": ops.upload(np.array([s, factor], np.float32))}
