"""Two forms of QSGD adapt the number of levels to the aggregated gradient, which is equal on all ranks."""

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

#: Elements that are processed at a time if several operations read them.
MOMENTS_PIECE = 1 << 16


class _Adaptive(_NormQuantizer):
    """The base of both. The number of levels is in the state, which changes with the aggregate only; it also travels in the payload, so
    that decoding needs no state."""

    levels: int
    max_levels: int

    def __post_init__(self):
        super().__post_init__()
        if self.levels > self.max_levels:
            raise ParameterError(f"{self.name}: levels={self.levels} is more than max_levels={self.max_levels}; lower levels or raise it")

    def fields(self, spec):
        return (
            Field("levels", "uint16", 1),
            self.norms_field(spec),
            Field("codes", "uint8", code_bytes(spec.size, self.max_levels), variable=True),
        )

    def _levels_now(self, ops, state):
        """Returns (s, its wire form)."""
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
            raise PayloadError(f"has {len(payload[2])} bytes of codes, but {s} levels take {code_bytes(spec.size, s)}")
        return s

    def add_compiled(self, ops, total, payload, spec, first, divisor):
        return self.add_levels(ops, total, *payload[1:], self._levels_sent(ops, payload, spec), spec, first, divisor)

    def decompress(self, ops, payload, spec, info):
        return self.dequantize(ops, *payload[1:], self._levels_sent(ops, payload, spec), spec)


def start_knob(default: int):
    return knob(default, "levels above zero at the first step", low=1, high=32767, headline=True)


def most_knob():
    return knob(127, "largest number of levels", low=1, high=32767)


@register("adaqs")
@dataclass(frozen=True)
class AdaQS(_Adaptive):
    """Quantizes as qsgd does, and doubles the number of levels when the gradient's mean becomes small relative to its spread.

    C(x) is that of qsgd with s levels. After each step, the aggregated gradient a gives r = |mean(a)| / std(a), which is averaged over
    about `window` steps (R: a plain mean of the first `window`, then R <- R + (r - R) / window). After `window` steps R0 = R; from then
    on, if R < R0 / 2:  s <- min(2 s, max_levels) and R0 <- R. An aggregate that has no spread, or is not finite, changes nothing.
    x: float[d] -> s as uint16, a float32 norm per block of `bucket` elements, and d codes of 1 + ceil(log2(s + 1)) bits: 4.1 bits per
    element at first, 8.1 at most (and 6 bytes). s is equal on all ranks, because a is. Unbiased, omega = min(B / s^2, sqrt(B) / s) with
    B = bucket, as for qsgd; at most that of `levels`.
    State: `adaqs`, float32[4]: s, R, R0 and steps seen; R0 = 0 until it is known. A larger window reacts later, and less to noise.
    Source: Guo et al. 2020, who estimate the ratio by running moments; their exact rule for when to switch is not public, this one is ours.
    """

    shared_state: ClassVar[tuple[str, ...]] = ("adaqs",)
    levels: int = start_knob(7)
    max_levels: int = most_knob()
    bucket: int = bucket_knob()
    window: int = knob(10, "steps that the ratio of mean to spread is averaged over", low=1, high=10**6)

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
    """Returns |mean| / standard deviation; None if the spread is negligible or not finite."""
    mean = ops.total(x) / len(x)
    if not math.isfinite(mean):
        return None
    pieces = (ops.cast(x[at : at + MOMENTS_PIECE], "float64") - mean for at in range(0, len(x), MOMENTS_PIECE))
    spread = math.sqrt(math.fsum(ops.norm(piece) ** 2 for piece in pieces) / len(x))
    if not math.isfinite(spread) or spread <= 1e-6 * abs(mean):
        return None
    return abs(mean) / spread


@register("dqsgd")
@dataclass(frozen=True)
class DQSGD(_Adaptive):
    """Quantizes as qsgd does, with levels in proportion to the norm of the last aggregate: finely if it is large, coarsely if it is small.

    C(x) is that of qsgd with s = clamp(round(c ||a||_2), 1, max_levels) levels, where a is the last step's aggregate as a mean over ranks;
    at the first step s = `levels`. `factor` is c, in levels per unit of the gradient's norm; by default c = levels / ||a|| for the first a
    that is not zero, so that the bits fall with the norm from there. An aggregate that is zero, or not finite, changes nothing.
    x: float[d] -> s as uint16, a float32 norm per block of `bucket` elements, and d codes of 1 + ceil(log2(s + 1)) bits: 8.1 bits per
    element at first and at most (and 6 bytes), 2.1 at least. s is equal on all ranks, because a is. Unbiased, omega <= sqrt(B), that of
    one level, with B = bucket.
    State: `dqsgd`, float32[2]: s and c, which is 0 until it is known. A higher factor costs bits and adds less noise.
    Source: Yan et al. (DQ-SGD), by the description of Sahu et al. 2021; their closed form is not public, this one is ours.
    """

    shared_state: ClassVar[tuple[str, ...]] = ("dqsgd",)
    levels: int = start_knob(127)
    max_levels: int = most_knob()
    bucket: int = bucket_knob()
    factor: float = knob(0.0, "levels per unit of the aggregate's norm; 0: chosen so that the first aggregate gets `levels`", low=0)

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
