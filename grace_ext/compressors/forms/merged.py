"""Compresses the small tensors of a bucket as one, laid end to end: for a hundred biases, the fixed cost per tensor exceeds the work.

The bytes are those of each tensor by itself, one after the other, so it does not matter which tensors a rank merges.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...errors import PayloadError
from ...parts.field import Field
from ...parts.ops import Array, Ops
from ...parts.payload import pack, unpack
from ...parts.tensor import StepInfo, TensorSpec
from ..base import Compressor, sent_by
from ..fast_path import Payload

if TYPE_CHECKING:
    pass

#: The most elements of a tensor that may be merged, and of all tensors that are merged into one, so that they stay in the cache.
SMALL, ROOM = 1 << 14, 1 << 17


def fields_of(each: Compressor, specs: tuple[TensorSpec, ...]) -> tuple[tuple[str, tuple[Field, ...]], ...]:
    """Returns (name, fields) of each tensor by itself."""
    return tuple((spec.name, each.fields(spec)) for spec in specs)


@dataclass(frozen=True)
class Merged(Compressor):
    """Handles several tensors as one, with the payload of each by itself. Not registered. Subclasses define the forms that handle all of
    them in one pass: `fused` and `add_all`."""

    each: Any
    specs: tuple[TensorSpec, ...]

    def __post_init__(self):
        pass  # no knobs

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array([spec.size for spec in self.specs])

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)

    @cached_property
    def _slices(self) -> list[slice]:
        ends = [int(end) for end in self.ends]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def _fields(self) -> tuple[Field, ...]:
        tensors = fields_of(self.each, self.specs)
        every = [field for _, fields in tensors for field in fields]
        variable = any(field.variable for field in every)
        return (Field("payloads", "uint8", sum(field.max_bytes for field in every), variable, tensors),)

    def fields(self, spec):
        return self._fields

    def _apart(self, ops: Ops, payload: Payload, rank: int) -> list[Payload]:
        """Returns each tensor's own payload. Raises PayloadError."""
        return list(unpack(ops, payload[0], fields_of(self.each, self.specs), rank))

    def explain(self, ops: Ops, payload: Payload, rank: int) -> None:
        """Raises the PayloadError of the tensor at fault, if a payload cannot be decoded. For compressors that decode without StepInfo."""
        info: Any = None
        for own, its in zip(self.specs, self._apart(ops, payload, rank), strict=True):
            with sent_by(rank, own.name):
                self.each.decompress(ops, its, own, info)

    def _whole(self, ops: Ops, payloads: Iterator[Payload]) -> Payload:
        """Joins the tensors' own payloads: the inverse of `_apart`."""
        pieces = [piece for spec, payload in zip(self.specs, payloads, strict=True) for piece in pack(ops, self.each.fields(spec), payload)]
        return (ops.concat(pieces),)

    def compress(self, ops, x, spec, info, state):
        compressed = (self.each.compress(ops, x[here], own, info, {})[0] for here, own in zip(self._slices, self.specs, strict=True))
        return self._whole(ops, compressed), state

    def decompress(self, ops, payload, spec, info):
        apart = zip(self._apart(ops, payload, info.rank), self.specs, strict=True)
        return ops.concat([self.each.decompress(ops, own, one, info) for own, one in apart])

    def combine(self, ops, payloads, spec, info, out=None):
        out = ops.empty(spec.size) if out is None else out
        if self.add_all(ops, out, payloads, spec, info):
            return out
        # A payload is invalid: the tensor's own compressor raises the error that says why.
        apart = [self._apart(ops, payload, rank) for rank, payload in enumerate(payloads)]
        for here, own, its in zip(self._slices, self.specs, zip(*apart, strict=True), strict=True):
            result = self.each.combine(ops, its, own, info, out[here])
            if result.base is not out:
                out[here] = result
        return out

    @abstractmethod
    def add_all(self, ops: Ops, total: Array, payloads: Sequence[Payload], spec: TensorSpec, info: StepInfo) -> bool:
        """Does what `combine` does, into `total`. Returns False if a payload is invalid."""


class MergedCasts(Merged):
    """Merges tensors of a compressor that casts every element and sends nothing else (none, fp16, bf16). All is as for one tensor, except
    the names in errors."""

    summable: ClassVar[bool] = True

    @cached_property
    def _fields(self):
        tensors = fields_of(self.each, self.specs)
        return (Field("values", tensors[0][1][0].dtype, int(self.ends[-1]), merged=tensors),)

    def fused(self, ops, grad, feedback, spec, info, state):
        return self.each.fused(ops, grad, feedback, spec, info, state)

    def compress(self, ops, x, spec, info, state):
        return self.each.compress(ops, x, spec, info, state)

    def decompress(self, ops, payload, spec, info):
        return self.each.decompress(ops, payload, spec, info)

    def combine(self, ops, payloads, spec, info, out=None):
        return super().combine(ops, payloads, spec, info, out) if ops.kernels else self.each.combine(ops, payloads, spec, info, out)

    def decompress_into(self, ops, payload, spec, info, out):
        return self.each.decompress_into(ops, payload, spec, info, out)

    def add_all(self, ops, total, payloads, spec, info):
        try:
            total[:] = self.each.combine(ops, payloads, spec, info, total)
        except PayloadError:
            return False
        return True
