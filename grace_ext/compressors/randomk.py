from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import rng
from ..parts import knob
from . import register
from .base import Compressor, Field
from .sparse import VALUES, kept, ratio_knob, scatter, values_knob


@register("randomk")
@dataclass(frozen=True)
class RandomK(Compressor):
    """Sends the elements at k random positions, the same on all ranks and new at every step.

    C(x)_j = x_j for j in R_t, else 0;  |R_t| = k = max(1, ceil(ratio * d)), drawn without replacement from (seed, parameter, step).
    x: float[d] -> values float32[k] (or 16 bits); positions are never sent. Summable, because they are shared.
    Wire: 4k bytes. Contraction delta = k/d in expectation: pair with 'residual'. With scale=True the values are multiplied by d/k,
    which makes it unbiased with variance (d/k - 1) ||x||^2: then use no memory.
    Source: Stich et al. 2018; Konecny et al. 2016. GRACE draws with replacement and reseeds the user's generator; this does neither.
    """

    summable: ClassVar[bool] = True
    ratio: float = ratio_knob()
    scale: bool = knob(False, "multiply by d/k: unbiased, for use without a memory")
    values: str = values_knob()

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.scale

    @property
    def wants_memory(self) -> bool:  # type: ignore[override]
        return not self.scale

    def fields(self, spec):
        return (Field("values", VALUES[self.values], kept(self.ratio, spec.size)),)

    def _positions(self, ops, spec, info):
        return ops.upload(rng.sample(info.shared_key(spec.name, "randomk"), spec.size, kept(self.ratio, spec.size)))

    def compress(self, ops, x, spec, info, state):
        values = x[self._positions(ops, spec, info)]
        if self.scale:
            values = ops.cast(values, "float64") * (spec.size / kept(self.ratio, spec.size))  # too large for float32: saturates
        return (ops.to_bytes(values, VALUES[self.values]),), state

    def decompress(self, ops, payload, spec, info):
        return scatter(ops, self._positions(ops, spec, info), ops.from_bytes(payload[0], VALUES[self.values]), spec.size)
