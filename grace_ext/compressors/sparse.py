"""What compressors share that send some elements and zero for the rest: subclasses say which positions, this is their wire form."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..coding import CODINGS, decode_indices, encode_indices, index_bytes, max_index_bytes
from ..errors import PayloadError
from ..parts import ITEMSIZE, knob
from .base import Compressor, Field, Fused, sent_by

if TYPE_CHECKING:
    from ..ops import Array, Feedback, Ops
    from ..spec import StepInfo, TensorSpec
    from .base import Payload, State

#: Names of the value precisions that a user chooses, and their wire dtypes.
VALUES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def values_knob():
    """How kept values travel; the rounding error of a 16-bit form stays in the residual."""
    return knob("fp32", "precision of the kept values on the wire", choices=tuple(VALUES))


def index_knob():
    return knob("auto", "coding of the positions; auto: the smallest whose size depends on k and d alone", choices=CODINGS)


def ratio_knob():
    return knob(
        0.01,
        "fraction of the elements sent; too low converges slowly or needs warm-up, too high saves little",
        above=0,
        high=1,
        headline=True,
    )


def kept(ratio: float, d: int) -> int:
    """How many of d elements a ratio keeps: at least one, rounded up."""
    return max(1, min(d, math.ceil(ratio * d - 1e-9)))


def finite(ops: Ops, values: Array) -> Array:
    """The values, which a peer sent. Raises PayloadError where one is not finite: its own were."""
    if not ops.all_finite(values):
        raise PayloadError("has a value that is not finite")
    return values


def without(ops: Ops, x: Array, feedback: Feedback, positions: Array, sent: Array | None) -> Array | None:
    """What is left of x, in place, once `sent` is (all of it, where None) at these positions: the new residual, where there is one."""
    if feedback.residual is None:
        return None
    if sent is None:
        x[positions] = 0.0
    else:
        ops.kernels.add_at(x, positions, sent, np.float32(-1))
    return x


def scatter(ops: Ops, positions: Array, values: Array, d: int) -> Array:
    """float32[d] with these values at these distinct positions."""
    dense = ops.zeros(d)
    dense[positions] = values
    return dense


class AtPositions(Compressor):
    """Base of compressors whose payload stands for values at some positions, and zero elsewhere."""

    selects: ClassVar[bool] = True

    @abstractmethod
    def decoded(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> tuple[Array, Array]:
        """(int64[m], ascending and distinct: positions; float32[m]: their values). Raises PayloadError."""

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
        total = ops.empty(spec.size) if out is None else out
        ends = np.cumsum([len(found) for found in positions])
        ops.kernels.add_sparse(total, ops.concat(positions), ops.concat(values), ends, np.float32(info.divisor))
        return total


class Selecting(AtPositions):
    """Base of compressors that send values and their positions. A subclass says which: `select`; and how many at most: `most`.

    Where `exactly` is True, `select` gives exactly `most` positions and the payload has a fixed size; else `typical` says how many are
    expected.
    """

    wants_memory: ClassVar[bool] = True
    #: The number of positions depends on the shape alone.
    exactly: ClassVar[bool] = False
    # A subclass has knobs of these names, or keeps these.
    values = "fp32"
    index = "auto"

    @abstractmethod
    def select(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, State]:
        """(int64[m], ascending and distinct: the positions to send; the new state)."""

    def most(self, d: int) -> int:
        """The largest number of positions that are sent of d."""
        return d

    def typical(self, d: int) -> int:
        """About how many positions are sent of d."""
        return self.most(d)

    def fields(self, spec):
        d, most = spec.size, self.most(spec.size)
        return (
            Field("values", VALUES[self.values], most, variable=not self.exactly),
            index_field(most, d, self.index, exactly=self.exactly),
        )

    def nbytes(self, spec):
        d, most, item = spec.size, self.most(spec.size), ITEMSIZE[VALUES[self.values]]
        if self.exactly:
            return super().nbytes(spec)
        # Where any number may be sent, `payload` sends all values without positions if that is not larger.
        return 8 + (item * d if most == d else item * most + max_index_bytes(most, d, self.index))

    def mean_nbytes(self, spec):
        d, count, item = spec.size, self.typical(spec.size), ITEMSIZE[VALUES[self.values]]
        bound = self.nbytes(spec)
        return bound if self.exactly else min(bound, item * count + index_bytes(count, d, self.index) + 8)

    def compress(self, ops, x, spec, info, state):
        positions, state = self.select(ops, x, spec, info, state)
        return self.payload(ops, x, positions, x[positions], spec), state

    def candidates(self, ops: Ops, grad: Array, feedback: Feedback, spec: TensorSpec, info: StepInfo) -> tuple[Array, Any] | None:
        """For `fused`: what is to be compressed, x, and what `chosen` wants to know of it; None where x is not finite."""
        x = ops.compensate(feedback, grad)
        return None if x is None else (x, None)

    def chosen(self, ops: Ops, x: Array, candidates: Any, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Array, Array, State]:
        """`select`, given the candidates: (positions, x there, new state)."""
        positions, state = self.select(ops, x, spec, info, state)
        return positions, x[positions], state

    def fused(self, ops, grad, feedback, spec, info, state):
        if grad.dtype != np.float32 or (found := self.candidates(ops, grad, feedback, spec, info)) is None:
            return None
        x, candidates = found
        positions, values, state = self.chosen(ops, x, candidates, spec, info, state)
        payload = self.payload(ops, x, positions, values, spec)
        if len(payload[0]) != len(positions) * ITEMSIZE[VALUES[self.values]]:  # all were sent, without positions
            positions = ops.arange(spec.size)
        sent = None if self.values == "fp32" else ops.from_bytes(payload[0], VALUES[self.values])
        return Fused(payload, without(ops, x, feedback, positions, sent), state)

    def payload(self, ops: Ops, x: Array, positions: Array, values: Array, spec: TensorSpec):
        """The wire form of x at these positions, where it has these values."""
        d, item = spec.size, ITEMSIZE[VALUES[self.values]]
        if not self.exactly and item * len(positions) + index_bytes(len(positions), d, self.index) >= item * d and self.most(d) == d:
            positions, values = ops.arange(d), ops.copy(x)  # x becomes what is left
        return ops.to_bytes(values, VALUES[self.values]), encode_indices(ops, positions, d, self.index)

    def decoded(self, ops, payload, spec, info):
        values = finite(ops, ops.from_bytes(payload[0], VALUES[self.values]))
        return decode_indices(ops, payload[1], len(values), spec.size, self.index), values


def count_field() -> Field:
    """The wire field of a number of positions, for payloads from whose other fields it does not follow."""
    return Field("count", "uint32", 1)


def put_count(ops: Ops, count: int) -> Array:
    """The bytes of a `count_field`."""
    return ops.upload(np.array([count], "<u4").view(np.uint8))


def get_count(ops: Ops, piece: Array, most: int, d: int) -> int:
    """The inverse. Raises PayloadError where there are more than `most`."""
    count = int(ops.host(piece).copy().view("<u4")[0])
    if count > most:
        raise PayloadError(f"claims {count} values of {d} elements, at most {most} are possible")
    return count


def expect_bytes(piece: Array, size: int, what: str) -> None:
    """Raises PayloadError where a variable field has not the size that a count before it implies."""
    if len(piece) != size:
        raise PayloadError(f"has {len(piece)} bytes of {what}, expected {size}")


def index_field(most: int, d: int, index: str, *, exactly: bool) -> Field:
    """The wire field of at most (or exactly) `most` positions of d."""
    if exactly and index != "golomb":
        return Field("positions", "uint8", index_bytes(most, d, index))
    return Field("positions", "uint8", max_index_bytes(most, d, index), variable=True)
