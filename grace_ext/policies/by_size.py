from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..parts.part import knob
from . import register
from .base import Policy, route_knob


@register("by_size")
@dataclass(frozen=True)
class BySize(Policy):
    """Chooses one spec for small tensors and another for large ones.

    A tensor of fewer than `min_elements` elements goes through `small`, by default dense, every other one through `large`.
    If ranks share the rows of a matrix (`fsdp_hook(..., share_low_rank=True)`), the whole matrix counts.
    Biases and normalisation scales are a thousandth of a model's bytes, and compressing them costs a header and a call each. A higher
    limit sends more bytes and compresses less of what is sensitive. The choice is the same at every step. State: none.
    Source: common practice; torch_cgx bypasses tensors under 1,024 elements without being asked.
    """

    min_elements: int = knob(1024, "tensors with fewer elements are small", low=0, headline=True)
    small: Any = route_knob("none", "spec for small tensors")
    large: Any = route_knob("topk(ratio=0.01) + residual", "spec for all other tensors")

    def _knob(self, spec) -> str:
        return "small" if spec.whole.size < self.min_elements else "large"

    def choose(self, query):
        which = self._knob(query.spec)
        return getattr(self, which).choose(query.under(which))

    def branches(self, spec):
        return {self._knob(spec): getattr(self, self._knob(spec))}

    def notices(self, specs):
        largest = max((spec.whole.size for spec in specs), default=0)
        if largest >= self.min_elements:
            return []
        found = f"no parameter has min_elements={self.min_elements} elements, the largest has {largest}"
        return [f"by_size: {found}; all go through {self.small}"]

    @property
    def leaves(self):
        return (*self.small.leaves, *self.large.leaves)
