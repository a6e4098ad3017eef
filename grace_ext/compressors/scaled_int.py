from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import PayloadError, UnsupportedError
from ..parts.field import FLOAT32_MAX, Field
from ..parts.part import knob
from ..parts.requests import AllReduce, Gather
from . import register
from .base import Compressor, Exchanged, sent_by
from .forms.scales import blocks, floats_from_bytes, floats_to_bytes


@register("scaled_int")
@dataclass(frozen=True)
class ScaledInt(Compressor):
    """Rounds to integers with a scale that all ranks share, and sums the integers: the sum is exact, in any order.

    q_i = round(a x_i), a = 2^k with the largest k for which a max_i |x_i| <= L = floor((2^(width-1) - 1) / n);  result sum_i q_i / (a n).
    No sum of n ranks can overflow, because |q_i| <= L. Two rounds: the ranks' maxima are gathered, 4 bytes per block of `block`
    elements (default: the whole tensor), then the integers are all-reduced. With communicators other than allreduce, each rank's own
    maximum travels in its payload, with n = 1 in the rule.
    x: float[d] -> a float32 maximum per block, and d integers of `width` bits: 32, 16 or 8 bits per element. 32 bits save nothing: they
    give sums that do not depend on the order, to the bit. With 8 bits and n ranks, about log2(255 / n) bits of each element remain, and
    more than 127 ranks raise UnsupportedError; at 16 bits, more than 32767.
    |C(x)_j - x_j| <= 1 / (2 a) with rounding='nearest' (biased), < 1 / a with 'stochastic', which is unbiased (draws private to each rank);
    a > L / (2 max_i |x_i|). Smaller blocks have finer scales. A zero block stays zero. 'residual' helps at 8 bits.
    Source: Sapio et al. 2021 (SwitchML), who guess the next maximum from the last one; here it is known before the integers are sent.
    """

    summable: ClassVar[bool] = True
    width: int = knob(32, "bits per integer", choices=(32, 16, 8), headline=True)
    rounding: str = knob("nearest", "to the nearest integer, or at random without bias", choices=("nearest", "stochastic"))
    block: int | None = knob(None, "elements that share a scale; None: the whole tensor", low=1)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.rounding == "stochastic"

    @property
    def wants_memory(self) -> bool:  # type: ignore[override]
        return self.width == 8 and not self.unbiased

    @property
    def _dtype(self) -> str:
        return f"int{self.width}"

    def fields(self, spec):
        return Field("maxima", "float32", blocks(spec.size, self.block)[1]), Field("integers", self._dtype, spec.size)

    def sends_dense(self, spec):
        # 32 bits are chosen for the exact sum, not for the size.
        return self.width // 8 * spec.size > spec.nbytes if self.width == 32 else super().sends_dense(spec)

    def _limit(self, n: int) -> int:
        """Returns L, the largest integer that each of n ranks may send."""
        return (2 ** (self.width - 1) - 1) // n

    def _exponents(self, maxima: np.ndarray, limit: int) -> np.ndarray:
        """Returns k of each block: the largest with maximum * 2^k <= limit; 0 for zero blocks."""
        mantissa, exponent = np.frexp(maxima.astype(np.float64))
        bits = limit.bit_length()
        return np.where(maxima > 0, bits - exponent - (mantissa * 2.0**bits > limit), 0)

    def _powers(self, ops, exponents: np.ndarray, spec):
        """Returns 2^k per element (one number if there is one block), as float64 because k may be beyond the range of float32."""
        powers = np.ldexp(1.0, exponents)
        return float(powers[0]) if len(powers) == 1 else ops.spread(powers, self.block, spec.size, "float64")

    def _round(self, ops, x, exponents, spec, info):
        """Returns the integers, int64[d]."""
        scaled = ops.cast(x, "float64") * self._powers(ops, exponents, spec)
        if self.rounding == "nearest":
            return ops.as_int(ops.rint(scaled))
        low = ops.floor(scaled)
        return ops.as_int(low) + ops.as_int(ops.drawn(scaled - low, info.private_key(spec.name, "scaled_int")))

    def _value(self, ops, integers, exponents, spec, divisor: int = 1):
        """Returns integers / (2^k divisor) as float32, saturated."""
        value = ops.cast(integers, "float64") * self._powers(ops, -exponents, spec)
        value = value / ops.number(divisor) if divisor > 1 else value
        return ops.cast(ops.clamped(value) if ops.largest(value) > FLOAT32_MAX else value, "float32")

    def _maxima(self, ops, x, spec) -> np.ndarray:
        return ops.host(ops.block_norms(x, blocks(spec.size, self.block)[0], np.inf))

    def compress(self, ops, x, spec, info, state):
        maxima = self._maxima(ops, x, spec)
        integers = self._round(ops, x, self._exponents(maxima, self._limit(1)), spec, info)
        return (floats_to_bytes(ops, maxima), ops.to_bytes(integers, self._dtype)), state

    def decompress(self, ops, payload, spec, info):
        exponents = self._exponents(ops.host(floats_from_bytes(ops, payload[0], "maximum")), self._limit(1))
        integers = ops.from_bytes(payload[1], self._dtype)
        if int(integers.min()) < -self._limit(1):
            raise PayloadError(f"has an integer below {-self._limit(1)}")
        return self._value(ops, integers, exponents, spec)

    def exchange(self, ops, x, spec, info, state, communicator):
        if communicator.name != "allreduce":
            return (yield from super().exchange(ops, x, spec, info, state, communicator))
        limit = self._limit(info.size)
        if not limit:
            raise UnsupportedError(f"scaled_int: the sum of {info.size} ranks does not fit {self.width} bits; use a larger width")
        gathered = yield Gather(self.fields(spec)[:1], (floats_to_bytes(ops, self._maxima(ops, x, spec)),))
        maxima = []
        for rank, (piece,) in enumerate(gathered):
            with sent_by(rank, spec.name):
                maxima.append(ops.host(floats_from_bytes(ops, piece, "maximum")))
        exponents = self._exponents(np.max(maxima, axis=0), limit)
        integers = self._round(ops, x, exponents, spec, info)
        total = yield AllReduce(integers, self._dtype)
        aggregate = self._value(ops, total, exponents, spec, info.divisor)
        return Exchanged(aggregate, lambda: self._value(ops, integers, exponents, spec), state)
