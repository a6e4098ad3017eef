"""The compiled forms that a compressor may have. An author need not read this: without them the plain forms run, and give the same bytes.

A compressor may do in one pass what otherwise takes several: add the residual, compress, and keep what was not sent (`fused`,
`fused_rounds`); decode a payload straight into the sum (`add_compiled`); write a result where the gradient was (`decompress_into`); and
compress many small tensors as one (`merged`). `ops` is then a FastOps (parts/fast_ops.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..parts.fast_ops import FastOps
    from ..parts.ops import Array, Feedback, Ops, Zeros
    from ..parts.state import State
    from ..parts.tensor import StepInfo, TensorSpec

#: The wire form of one tensor: one uint8 array for each field of `Compressor.fields(spec)`.
Payload = Sequence["Array"]
#: What an exchange in rounds of its own gives: the result, what was not sent, and the new state.
RoundsDone = tuple["Array", "Array", "State"]


class Fused(NamedTuple):
    """What memory and compressor did in one pass over gradient and residual.

    payload: as `compress` makes it. unsent: the new residual, None if there was none. state: what changed of the compressor's state.
    zeroed: whether the gradient, which was spent, is now all zeros."""

    payload: Payload
    unsent: Array | None
    state: State = {}  # noqa: RUF012
    zeroed: bool = False


class FastPath:
    """The compiled forms of a compressor; each default says that there is none. `Compressor` inherits them."""

    def fused(self, ops: FastOps, grad: Array, feedback: Feedback, spec: TensorSpec, info: StepInfo, state: State) -> Fused | None:
        """Adds the residual, compresses, and keeps what was not sent, in one pass. Equal to these one after the other, bit for bit.
        None if there is no such form, or if what is to be compressed is not finite."""
        return None

    def fused_rounds(
        self, ops: FastOps, grad: Array, feedback: Feedback, spec: TensorSpec, info: StepInfo, state: State, out: Array | None
    ) -> Generator[Any, Any, RoundsDone] | None:
        """As `fused`, for a compressor that communicates in rounds of its own: a generator of all of them, which writes the result to `out`
        if that is given."""
        return None

    def add_compiled(self, ops: FastOps, total: Array, payload: Payload, spec: TensorSpec, first: bool, divisor: int) -> bool:
        """Adds one rank's payload to `total` by a kernel, if the result is the plain mean: total_j += x_j; for the first rank
        total_j = 0 + x_j, whatever was there; and then total_j /= divisor, which is above 1 for the last rank only.

        Returns whether it did that. False, if there is no such kernel or this payload is not one for it, asks for the plain form: then
        `total` was not changed, or the plain form raises PayloadError for this payload. Subclasses that decode differently override it."""
        return False

    def decompress_into(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo, out: Array | Zeros | None) -> Array:
        """As `decompress`; may write to `out`, float32[d], if that is given, and then returns it. Zeros come only to compressors whose
        `fused` made them, here and in `combine`."""
        return self.decompress(ops, payload, spec, info)

    def merged(self, specs: tuple[TensorSpec, ...]) -> Any:
        """Returns the compressor of the concatenation of these small tensors, whose payload is the bytes of each by itself, one after the
        other; None if that is no shorter way. For compressors without a state that have `fused`."""
        return None

    def batched(self, specs: tuple[TensorSpec, ...]) -> Any:
        """Returns what `merged` does, for tensors of any size on a device: a compressor whose plain methods start no more operations for
        many tensors than for one. None if there is no such form."""
        return None

    def decompress(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> Array:
        """See Compressor."""
        raise NotImplementedError
