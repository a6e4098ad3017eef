"""Sparse compressors send some elements, and zero for the rest: subclasses choose the positions, and share the wire form here."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ...errors import PayloadError
from ...parts.field import ITEMSIZE, Field
from ...parts.ops import Zeros
from ...parts.part import knob
from ..base import Compressor, sent_by
from ..fast_path import Fused
from .batched import BatchedSelecting
from .merged import Merged
from .positions import CODINGS, decode_indices, encode_indices, index_bytes, max_index_bytes

if TYPE_CHECKING:
    from ...parts.fast_ops import FastOps
    from ...parts.ops import Array, Feedback, Ops
    from ...parts.state import State
    from ...parts.tensor import StepInfo, TensorSpec
    from ..fast_path import Payload

#: Names of the value precisions that a user chooses, and their wire dtypes.
VALUES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def values_knob():
    """Returns the knob for the precision of the values; the rounding error of a 16-bit form stays in the residual."""
    return knob("fp32", "precision of the sent values on the wire", choices=tuple(VALUES))


def index_knob():
    return knob("auto", "coding of the positions; auto: the smallest whose size depends only on k and d", choices=CODINGS)


def ratio_knob():
    return knob(
        0.01,
        "fraction of the elements sent; too low converges slowly or needs warm-up, too high saves little",
        above=0,
        high=1,
        headline=True,
    )


def kept(ratio: float, d: int) -> int:
    """Returns how many of d elements a ratio selects: at least one, rounded up."""
    return max(1, min(d, math.ceil(ratio * d - 1e-9)))


def finite(ops: Ops, values: Array) -> Array:
    """Returns the values, which a peer sent. Raises PayloadError if one is not finite, because no rank compresses such values."""
    ops.require(ops.all_finite(values), "has a value that is not finite")
    return values


def largest(ops: Ops, values: Array, k: int) -> Array:
    """Returns bool[m]: which of the values have the k largest magnitudes; see `Ops.top_k`."""
    which = np.zeros(len(values), bool)
    which[ops.top_k(values, k)] = True
    return which


def keep_rest(ops: Ops, left: Array, positions: Array, values: Array, sent: Array, dtype: str) -> None:
    """Stores in `left`, at these positions, what the values lost when they were rounded to `sent`, their wire form."""
    if dtype != "float32":
        left[positions] = values - ops.from_bytes(sent, dtype)


def scatter(ops: Ops, positions: Array, values: Array, d: int) -> Array:
    """Returns float32[d] with these values at these distinct positions, and zero elsewhere."""
    dense = ops.zeros(d)
    dense[positions] = values
    return dense


def add_up(ops: Ops, out: Array | Zeros, positions: list[Array], values: list[Array], divisor: int) -> Array:
    """Adds up the ranks' values at their positions, by a kernel, in rank order, and divides the sum; all else is zero. Writes to `out`."""
    ends = np.array(list(accumulate(map(len, positions))))
    add, total = (ops.kernels.add_to_zeros, out.array) if isinstance(out, Zeros) else (ops.kernels.add_sparse, out)
    add(total, ops.concat(positions), ops.concat(values), ends, np.float32(divisor))
    return total


class AtPositions(Compressor):
    """The base of compressors whose payload decodes to values at some positions, and zero elsewhere."""

    selects: ClassVar[bool] = True

    @abstractmethod
    def decoded(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> tuple[Array, Array]:
        """Returns (the positions: int64[m], ascending and distinct; their values: float32[m]). Raises PayloadError."""

    def positions(self, ops, payload, spec, info):
        return self.decoded(ops, payload, spec, info)[0]

    def decompress(self, ops, payload, spec, info):
        return scatter(ops, *self.decoded(ops, payload, spec, info), spec.size)

    def remove(self, ops, x, payload, spec, info):
        positions, values = self.decoded(ops, payload, spec, info)
        x[positions] -= values

    def accumulate(self, ops, total, payload, spec, info):
        positions, values = self.decoded(ops, payload, spec, info)
        total[positions] += values

    def combine(self, ops, payloads, spec, info, out=None):
        if not ops.kernels or type(self).aggregate is not Compressor.aggregate:
            return super().combine(ops, payloads, spec, info, out)
        positions, values = [], []
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                for found, into in zip(self.decoded(ops, payload, spec, info), (positions, values), strict=True):
                    into.append(found)
        return add_up(ops, ops.empty(spec.size) if out is None else out, positions, values, info.divisor)


class Selecting(AtPositions):
    """The base of compressors that send values and their positions. A subclass chooses the positions in `select`, at most `most` of them.

    If `exactly` is True, `select` returns exactly `most` positions and the payload has a fixed size; otherwise `typical` says how many
    are expected.
    """

    wants_memory: ClassVar[bool] = True
    #: Whether the number of positions depends on the shape alone.
    exactly: ClassVar[bool] = False
    #: Whether it has `take_each`.
    merges: ClassVar[bool] = False
    #: Whether it sends the `most` elements of largest magnitude of each tensor.
    largest: ClassVar[bool] = False
    # A subclass has knobs of these names, or keeps these values.
    values = "fp32"
    index = "auto"

    @abstractmethod
    def select(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, State]:
        """Returns (the positions to send: int64[m], ascending and distinct; the new state)."""

    def most(self, d: int) -> int:
        """Returns the largest number of positions that are sent of d."""
        return d

    def typical(self, d: int) -> int:
        """Returns about how many positions are sent of d."""
        return self.most(d)

    @property
    def wire(self) -> str:
        """The dtype of values on the wire."""
        return VALUES[self.values]

    def fields(self, spec):
        d, most = spec.size, self.most(spec.size)
        return (
            Field("values", self.wire, most, variable=not self.exactly),
            index_field(most, d, self.index, exactly=self.exactly),
        )

    def nbytes(self, spec):
        d, most, item = spec.size, self.most(spec.size), ITEMSIZE[self.wire]
        if self.exactly:
            return super().nbytes(spec)
        # If any number may be sent, `payload` sends all values without positions when that is not larger.
        return 8 + (item * d if most == d else item * most + max_index_bytes(most, d, self.index))

    def mean_nbytes(self, spec):
        d, count, item = spec.size, self.typical(spec.size), ITEMSIZE[self.wire]
        bound = self.nbytes(spec)
        return bound if self.exactly else min(bound, item * count + index_bytes(count, d, self.index) + 8)

    def compress(self, ops, x, spec, info, state):
        positions, state = self.select(ops, x, spec, info, state)
        return self.payload(ops, x, positions, spec), state

    def swept(
        self, ops: FastOps, grad: Array, feedback: Feedback, spec: TensorSpec, info: StepInfo, state: State
    ) -> tuple[Array, tuple[Array, Array] | None] | None:
        """Finds candidates in the pass that adds the residual, for `fused`. Returns, as `ops.sweep`, (what is compressed, with zeros at the
        candidates if there is a residual; their positions and values, or None if it did not look for any). None if the input is not finite.
        If it looked for candidates, a gradient that is spent is all zeros afterwards."""
        x = ops.compensate(feedback, grad)
        return None if x is None else (x, None)

    def take_each(
        self, ops: FastOps, grad: Array, feedback: Feedback, ends: np.ndarray, most: np.ndarray, info: StepInfo
    ) -> tuple[Array, Array, Array] | None:
        """Does `swept` and chooses, for the tensors that end at `ends` in `grad`, for `MergedSelecting`. Returns (what is compressed, with
        zeros at what is sent if there is a residual; positions; values); None if it is not finite. Subclasses that have it set `merges`."""
        raise NotImplementedError

    def merged(self, specs):
        return MergedSelecting(self, specs) if self.merges and self.index == "auto" else None

    def batched(self, specs):
        return BatchedSelecting(self, specs) if self.largest and self.index == "auto" else None

    def among(self, ops: Ops, values: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, State] | None:
        """Returns (which of these candidates to send: bool[m]; the new state); None if `select` has to choose instead."""
        return None

    def fused(self, ops, grad, feedback, spec, info, state):
        if grad.dtype != np.float32 or (swept := self.swept(ops, grad, feedback, spec, info, state)) is None:
            return None
        x, found = swept
        left = x if feedback.residual is not None else None  # what is not sent; without a residual, x is the gradient and must not change
        chosen = found and self.among(ops, found[1], spec, info, state)
        if not chosen:
            if found and left is not None:
                left[found[0]] = found[1]
            positions, state = self.select(ops, x, spec, info, state)
            values = x[positions]
            if left is not None:
                left[positions] = 0
        else:
            positions, values = found
            which, state = chosen
            if not which.all():
                count = ops.kernels.put_back(x[:0] if left is None else left, positions, values, which)
                positions, values = positions[:count], values[:count]
        if self.sends_all(len(positions), spec.size):
            if left is not None:
                left[positions] = values
            positions, values = ops.arange(spec.size), ops.copy(x)
            if left is not None:
                left[:] = 0
        payload = self._wire(ops, positions, values, spec)
        if left is not None:
            keep_rest(ops, left, positions, values, payload[0], self.wire)
        return Fused(payload, left, state, zeroed=feedback.spent and left is not None and found is not None)

    def payload(self, ops: Ops, x: Array, positions: Array, spec: TensorSpec) -> Payload:
        """Returns the wire form of x at these positions."""
        if self.sends_all(len(positions), spec.size):
            positions = ops.arange(spec.size)
        return self._wire(ops, positions, x[positions], spec)

    def sends_all(self, count: int, d: int) -> bool:
        """Whether all values without positions are no larger than `count` values with theirs."""
        item = ITEMSIZE[self.wire]
        return not self.exactly and self.most(d) == d and item * count + index_bytes(count, d, self.index) >= item * d

    def _wire(self, ops: Ops, positions: Array, values: Array, spec: TensorSpec) -> Payload:
        return ops.to_bytes(values, self.wire), encode_indices(ops, positions, spec.size, self.index)

    def decoded(self, ops, payload, spec, info):
        values = finite(ops, ops.from_bytes(payload[0], self.wire))
        return decode_indices(ops, payload[1], len(values), spec.size, self.index), values


class MergedSelecting(Merged):
    """Merges small tensors of a Selecting compressor with the index coding 'auto'."""

    @cached_property
    def most(self) -> np.ndarray:
        """The largest number of positions of each tensor; the exact number if the compressor is `exactly`."""
        return np.array([self.each.most(spec.size) for spec in self.specs])

    def fused(self, ops, grad, feedback, spec, info, state):
        taken = self.each.take_each(ops, grad, feedback, self.ends, self.most, info)
        if taken is None:
            return None
        x, positions, values = taken
        left, counted = None if feedback.residual is None else x, not self.each.exactly
        found = np.searchsorted(positions, self.ends)
        if counted:
            counts = np.diff(found, prepend=0).tolist()
            whole = [self.each.sends_all(count, own.size) for count, own in zip(counts, self.specs, strict=True)]
            if any(whole):
                positions, values, found = self._with_whole(ops, x, left, positions, values, found, whole)
        sent = ops.to_bytes(values, self.each.wire)
        if left is not None:
            keep_rest(ops, left, positions, values, sent, self.each.wire)
        counts = np.diff(found, prepend=0).tolist()
        codes = sum(index_bytes(count, own.size) for count, own in zip(counts, self.specs, strict=True))
        payload = np.zeros(len(sent) + codes + 8 * counted * len(self.specs), np.uint8)
        ops.kernels.merge_sparse(positions, sent, ITEMSIZE[self.each.wire], found, self.ends, counted, payload)
        return Fused((payload,), left)

    def _with_whole(self, ops, x, left, positions, values, found, whole):
        """Sends all elements, without positions, of the tensors that `whole` marks, so that nothing of them is left. Returns (positions,
        values, where each tensor's end)."""
        places, kept, start = [], [], 0
        for here, end, every in zip(self._slices, found, whole, strict=True):
            places.append(positions[start:end])
            kept.append(values[start:end])
            if every:
                full = ops.copy(x[here])
                full[places[-1] - here.start] = kept[-1]
                if left is not None:
                    left[here] = 0
                places[-1], kept[-1] = np.arange(here.start, here.stop), full
            start = end
        return ops.concat(places), ops.concat(kept), np.array(list(accumulate(map(len, places))))

    def add_all(self, ops, total, payloads, spec, info):
        item, places, values = ITEMSIZE[self.each.wire], [], []
        for (data,) in payloads:
            room = min(len(data) // item, len(total))
            positions, sent = np.empty(room, np.int64), np.empty(item * room, np.uint8)
            found = ops.kernels.open_sparse(data, item, self.most, self.ends, not self.each.exactly, positions, sent)
            if found < 0:
                return False
            places.append(positions[:found])
            values.append(ops.from_bytes(sent[: item * found], self.each.wire))
        if not all(ops.all_finite(some) for some in values):
            return False
        add_up(ops, total, places, values, info.divisor)
        return True


def count_field() -> Field:
    """Returns the wire field of a number of positions, for payloads whose other fields do not imply it."""
    return Field("count", "uint32", 1)


def put_count(ops: Ops, count: int) -> Array:
    """Returns the bytes of a `count_field`."""
    return ops.upload(np.array([count], "<u4").view(np.uint8))


def get_count(ops: Ops, piece: Array, most: int, d: int) -> int:
    """Returns the count of a `count_field`. Raises PayloadError if it is more than `most`."""
    count = int(ops.host(piece).copy().view("<u4")[0])
    if count > most:
        raise PayloadError(f"claims {count} values of {d} elements, at most {most} are possible")
    return count


def expect_bytes(piece: Array, size: int, what: str) -> None:
    """Raises PayloadError if a variable field does not have the size that a count before it implies."""
    if len(piece) != size:
        raise PayloadError(f"has {len(piece)} bytes of {what}, expected {size}")


def index_field(most: int, d: int, index: str, *, exactly: bool) -> Field:
    """Returns the wire field of at most (or exactly) `most` positions of d."""
    if exactly and index != "golomb":
        return Field("positions", "uint8", index_bytes(most, d, index))
    return Field("positions", "uint8", max_index_bytes(most, d, index), variable=True)
