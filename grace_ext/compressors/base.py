"""What a compressor is. Subclass it as a frozen dataclass, register it by name, and the contract suite tests it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import PayloadError
from ..parts.field import Field
from ..parts.part import Part
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec

if TYPE_CHECKING:
    from ..communicators.base import Communicator
    from ..parts.ops import Array, Feedback, Ops, Zeros

# The wire form of one tensor: one uint8 array for each field of `fields(spec)`.
Payload = Sequence["Array"]


class Exchanged(NamedTuple):
    """What the exchange of one tensor gives: the aggregate of all ranks, what this rank's own payload stands for and where (functions,
    because a memory may not ask), what the compressor and the communicator changed of their state, and (for memories) the compressor that
    the tensor really went through, which is `none` where it was sent dense."""

    aggregate: Array
    values: Callable[[], Array]
    state: State
    positions: Callable[[], Array | None] = lambda: None
    compressor: Any = None
    #: Takes `values` away from an array of the caller's own, in place, where there is a shorter way than by making them.
    remove: Callable[[Array], None] | None = None


class Fused(NamedTuple):
    """What memory and compressor did in one pass over gradient and residual: the payload, the new residual (None where there was none),
    what changed of the compressor's state, and whether the gradient, which was spent, is now all zeros."""

    payload: Payload
    unsent: Array | None
    state: State = {}  # noqa: RUF012
    zeroed: bool = False


#: What an exchange in rounds of its own gives: the result, what was not sent, and the new state.
RoundsDone = tuple["Array", "Array", State]


@dataclass(frozen=True)
class Compressor(Part):
    """Turns a flat float array into a packed payload and back.

    A compressor owns no state, touches no network and draws from no global generator: state comes in and goes out, and random
    words come from keys of `info`. It is given finite input only, of at least one element.
    """

    kind: ClassVar[str] = "compressor"
    #: Payloads of several ranks can be added up (they share indices, bases or scales), so an all-reduce may carry them.
    summable: ClassVar[bool] = False
    #: E[decode(encode(x))] = x.
    unbiased: ClassVar[bool] = False
    #: Training without error feedback is expected to suffer: one warning where the memory is 'none'.
    wants_memory: ClassVar[bool] = False
    #: It communicates in rounds of its own, over communicators of these names only (PowerSGD: P, then Q, by all-reduce).
    rounds: ClassVar[tuple[str, ...]] = ()
    #: It sends values at some positions and zero elsewhere, and `positions` tells which.
    selects: ClassVar[bool] = False
    #: The result is a vote of the ranks' signs, not a mean.
    votes: ClassVar[bool] = False
    #: The result is a mean of what the ranks sent, or a vote. Where it is neither (signs of a mean), nothing may compress it again.
    averages: ClassVar[bool] = True
    #: It looks at all tensors of the model at once, so they travel in one bucket.
    whole_model: ClassVar[bool] = False
    #: The same input gives the same payload in every array library, byte for byte.
    deterministic_bytes: ClassVar[bool] = True
    #: The aggregate is not a mean (a vote), so that sending a tensor dense instead would change its meaning.
    always_compresses: ClassVar[bool] = False
    #: float64 gradients reach it as float64; every other compressor works in float32.
    keeps_float64: ClassVar[bool] = False

    @abstractmethod
    def fields(self, spec: TensorSpec) -> tuple[Field, ...]:
        """What the payload of such a tensor consists of. Counts are exact, or upper bounds where a field is variable."""

    @abstractmethod
    def compress(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Payload, State]:
        """The payload of x, and the new state."""

    @abstractmethod
    def decompress(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> Array:
        """The flat float array that the payload stands for: a new one, never a view of the payload. Pure. Raises PayloadError."""

    def decompress_into(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo, out: Array | Zeros | None) -> Array:
        """As `decompress`; may be written to `out`, float32[d], where that is given, and is then that array. Zeros come only to compressors
        whose `fused` made them, here and in `combine`."""
        return self.decompress(ops, payload, spec, info)

    def init(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> State:
        """The state before the first step. Equal on all ranks where it takes part in what they share."""
        return {}

    def resized(self, ops: Ops, key: str, before: Array, fresh: Array) -> Array:
        """An array of its state that another setting of its knobs has left (a policy changed them), in the size of its own: what `init`
        gave, where nothing of the old one is of use."""
        return fresh

    def positions(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> Array | None:
        """int64[m], ascending: where the payload has values; None where it stands for every element. Raises PayloadError."""
        return None

    def accumulate(self, ops: Ops, total: Array, payload: Payload, spec: TensorSpec, info: StepInfo) -> None:
        """Adds one rank's decoded payload to `total`, in place. Sparse compressors add only what they hold. Raises PayloadError."""
        decoded = self.decompress(ops, payload, spec, info)
        if not ops.all_finite(decoded):
            raise PayloadError("stands for values that are not finite, and does not say so")
        total += decoded

    def aggregate(self, ops: Ops, total: Array, spec: TensorSpec, info: StepInfo) -> Array:
        """From the sum over ranks, which may be overwritten, to the result: the mean (or, with divisor 1, the sum)."""
        total /= info.divisor
        return total

    def remove(self, ops: Ops, x: Array, payload: Payload, spec: TensorSpec, info: StepInfo) -> None:
        """x -= decompress(payload), in place."""
        x -= self.decompress(ops, payload, spec, info)

    def combine(self, ops: Ops, payloads: Sequence[Payload], spec: TensorSpec, info: StepInfo, out: Array | Zeros | None = None) -> Array:
        """The result for the payloads of all ranks, in rank order: a new array, or, where there is room for it (float32), `out`. Overridden
        where it is not a function of their sum."""
        wide = self.keeps_float64 and spec.dtype == "float64"
        compiled = ops.kernels and not wide and type(self).aggregate is Compressor.aggregate
        if out is None:
            out = ops.empty(spec.size) if compiled else ops.zeros(spec.size, "float64" if wide else "float32")
        last = len(payloads) - 1
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                if compiled and self.add_compiled(ops, out, payload, spec, rank == 0, info.divisor if rank == last else 1):
                    continue
                if rank == 0:
                    out[:] = 0
                self.accumulate(ops, out, payload, spec, info)
            if rank == last:
                out = self.aggregate(ops, out, spec, info)
        return out

    def add_compiled(self, ops: Ops, total: Array, payload: Payload, spec: TensorSpec, first: bool, divisor: int) -> bool:
        """`accumulate` by a kernel of `ops.kernels`, for `combine` where the result is the plain mean: total_j += x_j, for the first rank
        total_j = 0 + x_j whatever was there, and then total_j /= divisor, which is above 1 for the last rank only. Returns whether it did
        that. False, where there is no such kernel or this payload is not one for it, asks for the plain form: then `total` was not changed,
        or the plain form raises PayloadError for this payload. A subclass that decodes differently overrides it."""
        return False

    def fused(self, ops: Ops, grad: Array, feedback: Feedback, spec: TensorSpec, info: StepInfo, state: State) -> Fused | None:
        """The compiled form, where `ops.kernels` is there, of: add the residual, compress, keep what was not sent. Equal to these, bit for
        bit. None where there is no such form, or what is to be compressed is not finite."""
        return None

    def fused_rounds(
        self, ops: Ops, grad: Array, feedback: Feedback, spec: TensorSpec, info: StepInfo, state: State, out: Array | None
    ) -> Generator[Any, Any, RoundsDone] | None:
        """As `fused`, for a compressor that communicates in rounds of its own: a generator of all of them that returns (the result, in
        `out` where that is given; what was not sent; the new state)."""
        return None

    def on_aggregate(self, ops: Ops, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """The state (or what changes of it) once the result is known, which is the same on all ranks."""
        return {}

    def merged(self, specs: tuple[TensorSpec, ...]) -> Compressor | None:
        """What compresses the concatenation of such small tensors, with the bytes of each by itself, one after the other; None where that
        is no shorter way. For compressors without a state that have `fused`."""
        return None

    def recompressor(self) -> Compressor:
        """What sends a result that all ranks share the making of (communicator reduce_scatter): by default the compressor itself."""
        return self

    @property
    def keeps_state(self) -> bool:
        """It has a state of its own from step to step."""
        return type(self).init is not Compressor.init

    # --- what it promises --------------------------------------------------------------------------------------------
    def omega(self, d: int) -> float | None:
        """E||C(x) - x||^2 <= omega ||x||^2 for x of d elements, where C is unbiased; None where that is not promised."""
        return None

    def delta(self, d: int) -> float | None:
        """E||C(x) - x||^2 <= (1 - delta) ||x||^2, 0 < delta <= 1: a contraction; None where that is not promised."""
        return None

    def kappa(self, d: int) -> float | None:
        """||C(x) - x||^2 <= kappa^2 whatever x is (an absolute compressor); None where that is not promised."""
        return None

    def nbytes(self, spec: TensorSpec) -> int:
        """Upper bound of the payload's bytes on the wire, all rounds together, bucket header excluded."""
        return sum(field.max_bytes for field in self.fields(spec))

    def mean_nbytes(self, spec: TensorSpec) -> float:
        """Expected bytes a step, where that is less than the bound: sizes that vary, rounds that are not made at every step."""
        return self.nbytes(spec)

    @property
    def fixed_size(self) -> bool:
        """Payloads of one shape have one size, whatever the values are."""
        return not any(field.variable for field in self.fields(TensorSpec("", (64, 64))))

    @property
    def natural_memory(self) -> str:
        """The spec of the memory that it is meant to be used with."""
        return "residual" if self.wants_memory else "none"

    def sends_dense(self, spec: TensorSpec) -> bool:
        """Whether such a tensor is sent as it is instead: where the payload would not be smaller."""
        return not self.always_compresses and self.mean_nbytes(spec) >= spec.nbytes

    def check(self) -> None:
        """Raises IncompatiblePartsError where the compressors that it is made of do not fit."""

    def exchange(
        self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State, communicator: Communicator
    ) -> Generator[Any, Any, Exchanged]:
        """Compress, send, receive, aggregate. Overridden where the compressor has rounds of its own."""
        ready = yield from self.prepare(ops, x, spec, info)
        return (yield from communicator.exchange(ops, ready, x, spec, info, state))

    def prepare(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo) -> Generator[Any, Any, Compressor]:
        """For a compressor that looks at the whole model: asks the other tensors (exchange.Together), and returns the one to go on with."""
        return self
        yield


@contextmanager
def sent_by(rank: int, parameter: str) -> Iterator[None]:
    """Says in a PayloadError who sent the payload, and for what."""
    try:
        yield
    except PayloadError as error:
        raise error.at(rank, parameter) from None
