from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from ..arrays import sampling
from ..parts import rng
from ..parts.field import Field
from ..parts.ops import Zeros
from ..parts.part import knob
from ..parts.tensor import TensorSpec
from . import register
from .base import Compressor, Observed
from .fast_path import Fused
from .forms.merged import fields_of
from .forms.sparse import VALUES, keep_rest, kept, ratio_knob, scatter, values_knob


class _SharedPositions(Compressor):
    """Sends values at k positions that all ranks derive from (seed, parameter, step): only the values travel, and they can be summed."""

    summable: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    ratio: float
    scale: bool
    values: str

    def _draw(self, spec, info):
        """Returns the positions: int64[k] on the host, ascending and distinct."""
        raise NotImplementedError

    def draw_each(self, specs, info):
        """Returns what `_draw` returns for each of these tensors, as positions in their concatenation."""
        starts = accumulate((spec.size for spec in specs), initial=0)
        return np.concatenate([start + self._draw(spec, info) for start, spec in zip(starts, specs, strict=False)])

    def merged(self, specs):
        return None if self.scale else _Joined(self, specs)

    def batched(self, specs):
        return self.merged(specs)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.scale

    @property
    def wants_memory(self) -> bool:  # type: ignore[override]
        return not self.scale

    @property
    def natural_memory(self) -> str:
        # An element waits d/k steps for its turn; all that it gathered by then, sent at once, is too much beside its neighbours' gradients.
        return "none" if self.scale else "residual(beta=0.9)"

    def omega(self, d):
        return d / kept(self.ratio, d) - 1 if self.scale and self.values == "fp32" else None

    def delta(self, d):
        return kept(self.ratio, d) / d if not self.scale and self.values == "fp32" else None

    def fields(self, spec):
        return (Field("values", VALUES[self.values], kept(self.ratio, spec.size)),)

    def positions(self, ops, payload, spec, info):
        return ops.upload(self._draw(spec, info))

    def observed(self, ops, payload, spec, info, state):
        found = super().observed(ops, payload, spec, info, state)
        factor = spec.size / kept(self.ratio, spec.size) if self.scale else 1.0
        return Observed(found.values / factor, found.operator)

    def compress(self, ops, x, spec, info, state):
        values = x[self.positions(ops, None, spec, info)]
        if self.scale:
            values = ops.cast(values, "float64") * (spec.size / kept(self.ratio, spec.size))  # too large for float32: saturates
        return (ops.to_bytes(values, VALUES[self.values]),), state

    def fused(self, ops, grad, feedback, spec, info, state):
        if self.scale or grad.dtype != np.float32:
            return None
        positions = self.positions(ops, None, spec, info)
        if (taken := ops.compensate_at(feedback, grad, positions)) is None:
            return None
        x, values = taken
        payload = ops.to_bytes(values, VALUES[self.values])
        if feedback.residual is None:
            return Fused((payload,), None)
        keep_rest(ops, x, positions, values, payload, VALUES[self.values])
        return Fused((payload,), x, zeroed=feedback.spent)

    def decompress_into(self, ops, payload, spec, info, out):
        if out is None or not ops.kernels:
            return self.decompress(ops, payload, spec, info)
        dense = out.array if isinstance(out, Zeros) else out
        if dense is out:
            dense[:] = 0
        # Set, not added to the zeros, of which a negative zero would become a positive one.
        ops.kernels.put_at(dense, self.positions(ops, payload, spec, info), ops.from_bytes(payload[0], VALUES[self.values]))
        return dense

    def decompress(self, ops, payload, spec, info):
        return scatter(ops, self.positions(ops, payload, spec, info), ops.from_bytes(payload[0], VALUES[self.values]), spec.size)


@dataclass(frozen=True)
class _Joined(_SharedPositions):
    """Handles several small tensors as one; see merged.py. Not registered."""

    each: Any
    specs: tuple[TensorSpec, ...]
    scale: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self):
        pass  # no knobs

    @property
    def values(self):
        return self.each.values

    def fields(self, spec):
        return self._fields

    @cached_property
    def _fields(self):
        tensors = fields_of(self.each, self.specs)
        return (Field("values", VALUES[self.values], sum(field.count for _, (field,) in tensors), merged=tensors),)

    def positions(self, ops, payload, spec, info):
        key = info.seed, info.step
        if self.__dict__.get("_drawn", (None,))[0] != key:  # the decoder needs the positions that the encoder drew
            drawn = self.each.draw_each(self.specs, info)
            drawn.flags.writeable = False
            self.__dict__["_drawn"] = key, drawn
        return ops.upload(self.__dict__["_drawn"][1])


def scale_knob():
    return knob(False, "multiply by d/k: unbiased, for use without a memory")


@register("randomk")
@dataclass(frozen=True)
class RandomK(_SharedPositions):
    """Sends the elements at k random positions, the same on all ranks and new at every step.

    C(x)_j = x_j for j in R_t, else 0;  |R_t| = k = max(1, ceil(ratio * d)), drawn without replacement from (seed, parameter, step).
    x: float[d] -> values float32[k] (or 16 bits); positions are never sent. Summable, because they are shared.
    Wire: 4k bytes. Contraction delta = k/d in expectation: pair with 'residual(beta=0.9)', which forgets what is too old, and send 5% or
    more if the training has few steps (docs/accuracy.md). With scale=True the values are multiplied by d/k, which makes it unbiased with
    variance (d/k - 1) ||x||^2: then use no memory.
    Source: Stich et al. 2018; Konecny et al. 2016. GRACE draws with replacement and reseeds the user's generator; this does neither.
    """

    ratio: float = ratio_knob()
    scale: bool = scale_knob()
    values: str = values_knob()

    def _draw(self, spec, info):
        return sampling.sample(info.shared_key(spec.name, "randomk"), spec.size, kept(self.ratio, spec.size))

    def draw_each(self, specs, info):
        sizes = [spec.size for spec in specs]
        return sampling.sample_each([info.shared_key(spec.name, "randomk") for spec in specs], sizes, [kept(self.ratio, d) for d in sizes])


@register("randblock")
@dataclass(frozen=True)
class RandBlock(_SharedPositions):
    """Sends one block of k neighbouring elements that starts at a random position, the same on all ranks and new at every step.

    C(x)_j = x_j for j in {s, s+1, ..., s+k-1} modulo d, else 0;  k = max(1, ceil(ratio * d)), s uniform from (seed, parameter, step).
    x: float[d] -> values float32[k] (or 16 bits), in ascending order of position. Summable.
    Wire: 4k bytes. The statistics of one element are those of randomk (delta = k/d, or unbiased with omega = d/k - 1 with scale=True);
    neighbours are sent together, which is faster to gather and converges as fast if their gradients are not correlated. Pair it with
    'residual(beta=0.9)': with beta=1, whole filters make the steps of d/k gradients at once, and training of small networks blows up.
    Source: Xie et al. 2020 (CSER, globally random blocks).
    """

    ratio: float = ratio_knob()
    scale: bool = scale_knob()
    values: str = values_knob()

    def _draw(self, spec, info):
        d, k = spec.size, kept(self.ratio, spec.size)
        low, high = (int(word) for word in rng.words(info.shared_key(spec.name, "randblock"), 2))
        start = (high << 32 | low) * d >> 64
        end = start + k
        return np.concatenate([np.arange(max(0, end - d)), np.arange(start, min(end, d))])
