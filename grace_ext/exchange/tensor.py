"""Exchanges one tensor: memory -> compressor -> communicator -> memory, as a generator that yields requests.

Non-finite rule. If a compensated gradient is not finite, its tensor takes part with zeros, so that sizes and rounds stay what the peers
expect, and the generator yields NotFinite. The bucket then raises a flag: in the header of gathered messages, as one appended NaN in
summed arrays. Every rank sees the flag, returns NaN for the bucket, and (driver.py) commits no state of that step at all.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Protocol

from ..communicators.base import Communicator
from ..compressors.base import Compressor, Exchanged
from ..compressors.fast_path import Fused, Payload, RoundsDone
from ..memories.base import Memory
from ..parts.fast_ops import FastOps, fast
from ..parts.field import FLOAT32_MAX
from ..parts.ops import Array, Feedback, Flag, Ops, Zeros
from ..parts.tensor import StepInfo, TensorSpec

State = dict[str, Array]


class NotFinite(NamedTuple):
    """Tells the bucket that this tensor's gradient is not finite on this rank, or may not be: `finite` is a flag that is still to be read.
    It asks the network for nothing; the answer is None."""

    finite: Flag


class Watch(Protocol):
    """Watches the exchange of one tensor, for metrics."""

    closely: bool

    def through(self, ops: Ops, job: Job, exchange: Generator[Any, Any, Outcome]) -> Generator[Any, Any, Outcome]:
        """Runs the exchange, passing its requests on, and measures it."""

    def sent(self, x: float, error: float) -> None:
        """Takes the norms of what was compressed and of what the payload lost of it. Called if `closely`."""


class Outcome(NamedTuple):
    """The result of one tensor's exchange, and the tensor's new state. finite: False if the aggregate overflowed, although every rank's
    gradient was finite; all ranks see the same bits, so all say so."""

    output: Array
    state: State
    finite: Flag = True


class Job(NamedTuple):
    """One tensor of a bucket at one step: its parts, its gradient as a flat float array, and its state.

    out: where the result may be written, which is the gradient's own memory, or None. watch: measures the exchange, if metrics are on."""

    spec: TensorSpec
    compressor: Compressor
    memory: Memory
    communicator: Communicator
    grad: Array
    state: State
    out: Array | None = None
    watch: Watch | None = None


def exchange_tensor(ops: Ops, job: Job, info: StepInfo) -> Generator[Any, Any, Outcome]:
    """Exchanges one gradient: by kernels if its parts have such a form (`compiled`), else by the parts' plain methods."""
    spec, memory, state = job.spec, job.memory, job.state
    if not spec.size and (spec.empty or not job.compressor.shares_rows):
        return Outcome(ops.copy(job.grad), state)
    if not state:
        state = initial_state(ops, spec, (job.compressor, memory, job.communicator), info)
    compiled_ops = fast(ops)
    running = compiled(compiled_ops, job, info, state) if compiled_ops else None
    if running:
        return (yield from running)
    send = _Sender(ops, job, info, state)
    output, *changes = yield from memory.exchange(ops, send, job.grad, spec, info, state)
    # What a memory keeps of a result that overflowed would never be finite again. All ranks see the same.
    finite = send.finite
    if _learns(memory):
        finite = finite & ops.all_finite(ops.cast(output, "float32"))
    return Outcome(output, _updated(state, *changes), finite)


class _Sender:
    """Sends arrays of one tensor for its memory, which may call it twice in a step: the second time it finds the state that the first left
    behind. finite: False if an aggregate is out of the range of what the memory keeps of it.

    It is a class because all tensors of a bucket wait for the network together, and the cells of a closure would be ten objects each."""

    __slots__ = ("finite", "info", "job", "ops", "state")

    def __init__(self, ops: Ops, job: Job, info: StepInfo, state: State):
        self.ops, self.job, self.info, self.state, self.finite = ops, job, info, dict(state), True

    def __call__(self, x: Array) -> Generator[Any, Any, Exchanged]:
        ops, info, (spec, compressor, memory, communicator, *_) = self.ops, self.info, self.job
        wide, carried = compressor.keeps_float64 and spec.dtype == "float64", memory.carried(spec)
        x = ops.cast(x, "float64" if wide else "float32")
        finite = _in_range(ops, compressor, x)  # a float64 that float32 cannot hold counts, too
        if finite is not True:
            yield NotFinite(finite)
            x = ops.kept_if(finite, x)
        done = yield from compressor.exchange(ops, x, carried, info, self.state, communicator)
        if self.job.watch is not None and self.job.watch.closely:
            self.job.watch.sent(ops.norm(x), ops.norm(x - done.values()))
        if wide and _learns(memory):  # it keeps float32
            self.finite = self.finite & ops.all_finite(ops.cast(done.aggregate, "float32"))
        kept = compressor.on_aggregate(ops, done.aggregate, carried, info, {**self.state, **done.state})
        changed = {**done.state, **kept}
        self.state.update(changed)
        return done._replace(state=changed, compressor=compressor)


def _learns(memory: Memory) -> bool:
    """Whether the memory keeps something of the result."""
    return bool(memory.shared_state or memory.mean_state) or type(memory).on_aggregate is not Memory.on_aggregate


def _in_range(ops: Ops, compressor: Compressor, x: Array) -> Flag:
    """Whether x is finite, and so is whatever it decodes to, and what that leaves of x. Transforms and products of matrices may be larger
    than every element, but not than the norm."""
    if compressor.deterministic_bytes or not len(x):
        return ops.all_finite(x)
    within = ops.block_norms(x, len(x), 2)[0] <= FLOAT32_MAX
    return within if ops.defers else bool(within)


def compiled(ops: FastOps, job: Job, info: StepInfo, state: State) -> Generator[Any, Any, Outcome] | None:
    """Exchanges one gradient by kernels that do the memory's work, too. None if these parts, or these values, have no such form."""
    feedback = job.memory.feedback(state)
    if not feedback:
        return None
    absorbed = job.memory.absorb(ops, job.grad, job.spec, info, state)
    state = {**state, **absorbed}
    grad = job.memory.incoming(job.grad, state)
    if grad is job.out:
        feedback = feedback._replace(spent=True)
    watch = job.watch if job.watch is not None and job.watch.closely else None
    x = compensated(ops, grad, feedback) if watch else None
    if one_pass(job.compressor, job.communicator):
        fused = job.compressor.fused(ops, grad, feedback, job.spec, info, state)
        if fused and watch:
            watch.sent(ops.norm(x), ops.norm(_unsent(ops, job, x, fused.payload, info) if fused.unsent is None else fused.unsent))
        return exchange_fused(ops, job, info, state, fused) if fused else None
    rounds = job.compressor.fused_rounds(ops, grad, feedback, job.spec, info, state, job.out)
    return _exchange_rounds(ops, job, state, rounds, watch, x) if rounds else None


def _unsent(ops: FastOps, job: Job, x: Array, payload: Payload, info: StepInfo) -> Array:
    decoded = ops.empty(job.spec.size)
    if not job.compressor.add_compiled(ops, decoded, payload, job.spec, True, 1):
        decoded = job.compressor.decompress(ops, payload, job.spec, info)
    return x - decoded


def compensated(ops: Ops, grad: Array, feedback: Feedback) -> Array:
    """Returns what is compressed: the gradient itself if nothing is added to it."""
    return grad if feedback.residual is None else ops.sum_up(feedback, grad)


def one_pass(compressor: Compressor, communicator: Communicator) -> bool:
    """Whether an exchange is no more than the compressor's `compress` and the communicator's `send`."""
    kind = type(compressor)
    return communicator.carries_payloads and kind.exchange is Compressor.exchange and kind.prepare is Compressor.prepare


def exchange_fused(ops: Ops, job: Job, info: StepInfo, state: State, fused: Fused) -> Generator[Any, Any, Outcome]:
    """Exchanges what memory and compressor have made in one pass."""
    before = {**state, **fused.state}
    out = Zeros(job.out) if fused.zeroed else job.out
    done = yield from job.communicator.send(ops, job.compressor, fused.payload, job.spec, info, fused.state, out)
    kept = job.compressor.on_aggregate(ops, done.aggregate, job.spec, info, before)
    unsent = {} if fused.unsent is None else {"residual": fused.unsent}
    return Outcome(done.aggregate, _updated(state, fused.state, done.state, kept, unsent, job.memory.marked(ops, done, before)))


def _exchange_rounds(
    ops: Ops, job: Job, state: State, rounds: Generator[Any, Any, RoundsDone], watch: Watch | None, x: Array | None
) -> Generator[Any, Any, Outcome]:
    before = ops.norm(x) if watch else 0.0  # the result may be written over the gradient
    aggregate, unsent, changed = yield from rounds
    if watch:
        watch.sent(before, ops.norm(unsent))
    return Outcome(aggregate, _updated(state, changed, {"residual": unsent}))


def initial_state(ops: Ops, spec: TensorSpec, parts: tuple[Compressor, Memory, Communicator], info: StepInfo) -> State:
    """Returns the state of one tensor before its first step, by key: its memory's, its compressor's and its communicator's."""
    compressor, memory, communicator = parts
    return {**memory.init(ops, spec, info), **compressor.init(ops, spec, info), **communicator.init(ops, compressor, spec, info)}


def replaced(old: State, new: Mapping[str, Array]) -> list[Array]:
    """Removes from an old state the arrays that its successor does not hold, and returns them: for `ops.recycle`, which must find no other
    reference."""
    return [old.pop(key) for key in list(old) if old[key] is not new.get(key)]


def _updated(state: Mapping[str, Array], *changes: Mapping[str, Array]) -> State:
    """Returns the state with what the parts changed. A part may hand back all that it was given; what it did not change is dropped, so that
    it does not overwrite another part's new value."""
    return {**state, **{key: array for change in changes for key, array in change.items() if array is not state.get(key)}}
