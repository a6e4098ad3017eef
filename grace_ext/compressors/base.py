"""The base of compressors. Subclass `Compressor` as a frozen dataclass and register it by name; the contract suite tests it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from ..errors import NOT_FLAGGED, PayloadError, Sender, sender
from ..parts.fast_ops import fast
from ..parts.field import Field
from ..parts.ops import Zeros
from ..parts.part import Part
from ..parts.state import State
from ..parts.tensor import StepInfo, TensorSpec
from .fast_path import FastPath, Payload

if TYPE_CHECKING:
    from ..parts.ops import Array, Ops


class Exchanged(NamedTuple):
    """What the exchange of one tensor gives.

    aggregate: of all ranks. values, positions: what this rank's own payload decodes to, and where it has values (functions, because a
    memory may not ask). state: what the compressor and the communicator changed of their state. compressor: the one that the tensor really
    went through, which is `none` if it was sent dense. remove: subtracts `values` from an array of the caller's own, in place, if that is
    shorter than making them."""

    aggregate: Array
    values: Callable[[], Array]
    state: State
    positions: Callable[[], Array | None] = lambda: None
    compressor: Any = None
    remove: Callable[[Array], None] | None = None


class Observed(NamedTuple):
    """What a payload says of the flat array x that was compressed: `values`, about operator(x).

    operator: a linear function of flat float arrays. It uses what all array libraries share (`x[positions]`, `@`, `reshape`) and `ops`, so
    that automatic differentiation passes through it. values: operator(x), up to the rounding of what was sent."""

    values: Array
    operator: Callable[[Array], Array]


class Carrier(Protocol):
    """What a compressor knows of a communicator: that it exchanges a tensor."""

    def exchange(
        self, ops: Ops, compressor: Any, x: Array, spec: TensorSpec, info: StepInfo, state: State
    ) -> Generator[Any, Any, Exchanged]: ...


@dataclass(frozen=True)
class Compressor(FastPath, Part):
    """Turns a flat float array into a packed payload and back.

    A subclass must define three methods: `fields`, what the payload consists of; `compress`; and `decompress`. It then declares what is
    true of it (`summable`, `unbiased`, `wants_memory`, ...), which decides what it can be combined with. Everything else has a default.

    A compressor owns no state, touches no network and draws from no global generator: state comes in and goes out, and random
    words come from keys of `info`. It is given finite input only, of at least one element.
    """

    # --- what an author must define -----------------------------------------------------------------------------------
    @abstractmethod
    def fields(self, spec: TensorSpec) -> tuple[Field, ...]:
        """Returns what the payload of such a tensor consists of. Counts are exact, or upper bounds if a field is variable."""

    @abstractmethod
    def compress(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State) -> tuple[Payload, State]:
        """Returns the payload of x, and the new state."""

    @abstractmethod
    def decompress(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> Array:
        """Returns the flat float array that the payload decodes to: a new one, never a view of the payload. Pure. Raises PayloadError."""

    # --- what an author declares --------------------------------------------------------------------------------------
    kind: ClassVar[str] = "compressor"
    #: Whether payloads of several ranks can be added up (they share indices, bases or scales), so that an all-reduce may carry them.
    summable: ClassVar[bool] = False
    #: Whether E[decode(encode(x))] = x.
    unbiased: ClassVar[bool] = False
    #: Whether training without error feedback is expected to suffer: one warning if the memory is 'none'.
    wants_memory: ClassVar[bool] = False
    #: Whether it sends values at some positions and zero elsewhere, so that `positions` tells which.
    selects: ClassVar[bool] = False
    #: What the result is: the 'mean' of what the ranks sent; a 'vote' of their signs, in {-1, 0, 1}; or the 'signs' of a mean. Only a mean
    #: has a size, so only a mean can be replaced by a dense exchange, and signs cannot be compressed again.
    result: ClassVar[str] = "mean"
    #: The names of the communicators that can carry its own rounds (PowerSGD: P, then Q, by all-reduce); () for one payload.
    rounds: ClassVar[tuple[str, ...]] = ()
    #: Whether it compresses matrices only, so that flat shards of a tensor cannot be compressed one by one.
    matrices_only: ClassVar[bool] = False
    #: Whether it looks at all tensors of the model at once, so that they travel in one bucket.
    whole_model: ClassVar[bool] = False
    #: Whether the same input gives the same payload in every array library, byte for byte.
    deterministic_bytes: ClassVar[bool] = True
    #: Whether float64 gradients reach it as float64; every other compressor works in float32.
    keeps_float64: ClassVar[bool] = False
    #: Whether it can exchange the rows of a matrix that this rank holds so that the result is that of the whole matrix (TensorSpec.rows).
    shares_rows: ClassVar[bool] = False
    #: Whether no field of fewer elements is longer, so that `fields` for many elements bounds the payloads of fewer.
    grows: ClassVar[bool] = True

    def omega(self, d: int) -> float | None:
        """E||C(x) - x||^2 <= omega ||x||^2 for x of d elements, if C is unbiased; None if that is not promised."""
        return None

    def delta(self, d: int) -> float | None:
        """E||C(x) - x||^2 <= (1 - delta) ||x||^2, 0 < delta <= 1: a contraction; None if that is not promised."""
        return None

    def kappa(self, d: int) -> float | None:
        """||C(x) - x||^2 <= kappa^2 whatever x is (an absolute compressor); None if that is not promised."""
        return None

    # --- state and sizes ----------------------------------------------------------------------------------------------
    def init(self, ops: Ops, spec: TensorSpec, info: StepInfo) -> State:
        """Returns the state before the first step. It must be equal on all ranks if it takes part in what they share."""
        return {}

    def resized(self, ops: Ops, key: str, before: Array, fresh: Array) -> Array:
        """Fits a state array to this compressor after a policy changed its knobs. Returns `fresh`, what `init` gave, if nothing of `before`
        can be kept."""
        return fresh

    def on_aggregate(self, ops: Ops, aggregate: Array, spec: TensorSpec, info: StepInfo, state: State) -> State:
        """Returns what changes in the state once the result is known, which is the same on all ranks."""
        return {}

    def nbytes(self, spec: TensorSpec) -> int:
        """Upper bound of the payload's bytes on the wire, all rounds together, bucket header excluded."""
        return sum(field.max_bytes for field in self.fields(spec))

    def mean_nbytes(self, spec: TensorSpec) -> float:
        """Expected bytes per step, if that is less than the bound: sizes that vary, rounds that are not made at every step."""
        return self.nbytes(spec)

    @property
    def keeps_state(self) -> bool:
        """Whether it has a state of its own from step to step."""
        return type(self).init is not Compressor.init

    @property
    def fixed_size(self) -> bool:
        """Whether payloads of one shape have one size, whatever the values are."""
        return not any(field.variable for field in self.fields(TensorSpec("", (64, 64))))

    @property
    def natural_memory(self) -> str:
        """The spec of the memory that it is meant to be used with."""
        return "residual" if self.wants_memory else "none"

    @property
    def averages(self) -> bool:
        """Whether the result is the mean of what the ranks' payloads decode to, up to rounding."""
        return self.result == "mean"

    def sends_dense(self, spec: TensorSpec) -> bool:
        """Whether such a tensor is sent uncompressed instead, because its payload would not be smaller."""
        return self.result == "mean" and self.mean_nbytes(spec) >= spec.nbytes

    def check(self) -> None:
        """Raises IncompatiblePartsError if the compressors that it is made of do not fit."""

    @property
    def caution(self) -> str | None:
        """Returns a warning, given once when it is composed with these knobs: they are valid, but train badly or cost more than they save.
        It is the rest of a sentence that begins with the compressor, and names the way out. None for most."""
        return None

    # --- decoding the ranks' payloads ---------------------------------------------------------------------------------
    def positions(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo) -> Array | None:
        """int64[m], ascending: where the payload has values; None if it has one for every element. Raises PayloadError."""
        return None

    def observed(self, ops: Ops, payload: Payload, spec: TensorSpec, info: StepInfo, state: State) -> Observed:
        """Returns what somebody who reads the payload, and knows this compressor, its knobs and the job's seed, learns of what was
        compressed, for `grace-ext privacy`. By default the decoded elements at `positions`, or all of them. Overridden if less is decoded
        than is learnt.

        payload: what one rank sends, in all rounds together. state: this compressor's own, before the step."""
        decoded, positions = self.decompress(ops, payload, spec, info), self.positions(ops, payload, spec, info)
        return Observed(decoded, whole) if positions is None else Observed(decoded[positions], lambda x: x[positions])

    def accumulate(self, ops: Ops, total: Array, payload: Payload, spec: TensorSpec, info: StepInfo) -> None:
        """Adds one rank's decoded payload to `total`, in place. Sparse compressors add only what they hold. Raises PayloadError."""
        decoded = self.decompress(ops, payload, spec, info)
        ops.require(ops.all_finite(decoded), NOT_FLAGGED)
        total += decoded

    def aggregate(self, ops: Ops, total: Array, spec: TensorSpec, info: StepInfo) -> Array:
        """Turns the sum over ranks, which may be overwritten, into the result: the mean (or, with divisor 1, the sum)."""
        total /= ops.number(info.divisor)
        return total

    def remove(self, ops: Ops, x: Array, payload: Payload, spec: TensorSpec, info: StepInfo) -> None:
        """x -= decompress(payload), in place."""
        x -= self.decompress(ops, payload, spec, info)

    def combine(self, ops: Ops, payloads: Sequence[Payload], spec: TensorSpec, info: StepInfo, out: Array | Zeros | None = None) -> Array:
        """Returns the result for the payloads of all ranks, in rank order: a new array, or `out` (float32), if that is given. Overridden if
        the result is not a function of their sum."""
        wide = self.keeps_float64 and spec.dtype == "float64"
        compiled = fast(ops) if not wide and type(self).aggregate is Compressor.aggregate else None
        # These sums write every element, so that they gain nothing from knowing that all are zero.
        total: Any = out.array if isinstance(out, Zeros) else out
        if total is None:
            total = compiled.empty(spec.size) if compiled else ops.zeros(spec.size, "float64" if wide else "float32")
        last = len(payloads) - 1
        for rank, payload in enumerate(payloads):
            with sent_by(rank, spec.name):
                if compiled and self.add_compiled(compiled, total, payload, spec, rank == 0, info.divisor if rank == last else 1):
                    continue
                if rank == 0:
                    total[:] = 0
                self.accumulate(ops, total, payload, spec, info)
            if rank == last:
                total = self.aggregate(ops, total, spec, info)
        return total

    def recompressor(self) -> Compressor:
        """Returns what sends a result of which each rank has a shard (communicator reduce_scatter): by default the compressor itself."""
        return self

    # --- the exchange of one tensor -----------------------------------------------------------------------------------
    def exchange(
        self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo, state: State, communicator: Carrier
    ) -> Generator[Any, Any, Exchanged]:
        """Compresses, sends, receives and aggregates. Overridden if the compressor has rounds of its own."""
        ready = yield from self.prepare(ops, x, spec, info)
        return (yield from communicator.exchange(ops, ready, x, spec, info, state))

    def prepare(self, ops: Ops, x: Array, spec: TensorSpec, info: StepInfo) -> Generator[Any, Any, Compressor]:
        """Asks the other tensors (requests.Together), for a compressor that looks at the whole model; returns the one to go on with."""
        return self
        yield


def whole(x: Array) -> Array:
    """Returns the array itself: the operator of payloads that have a value for every element."""
    return x


#: The name of the parameter whose parts are being decoded under names of their own.
_named: ContextVar[str | None] = ContextVar("named", default=None)


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Names this parameter in PayloadErrors, in place of the shard that is decoded."""
    before = _named.set(parameter)
    try:
        yield
    except PayloadError as error:
        raise (error if error.rank is None else error.at(error.rank, parameter)) from None
    finally:
        _named.reset(before)


@contextmanager
def sent_by(rank: int, parameter: str, explain: Callable[[], object] | None = None) -> Iterator[None]:
    """Says in a PayloadError who sent the payload, and for what. explain: raises a PayloadError that says more, if there is one."""
    who = sender.get() or Sender(rank, _named.get() or parameter, explain)  # who said so first knows the parameter's own name
    before = sender.set(who)
    try:
        yield
    except PayloadError as error:
        raise (who.blamed(error) if explain else error.at(rank, parameter)) from None
    finally:
        sender.reset(before)
