"""Requests, and the pipelines of one tensor and of one bucket: generators that yield collectives and are resumed with results.

Three layers, none of which blocks or knows a transport:
  exchange_tensor   memory -> compressor -> communicator -> memory, for one gradient; yields requests
  exchange_bucket   runs the tensors of one bucket in lockstep and fuses each round's requests into one collective a kind;
                    yields lists of Collective, and returns outputs, new states and whether every rank was finite
  carry             (a transport's) expresses a collective that its engine lacks by ones that it has

Non-finite rule. A tensor whose compensated gradient is not finite takes part with zeros, so that sizes and rounds stay what the
peers expect, and raises the bucket's flag: in the header of gathered messages, as one appended NaN in summed ones. Every rank
sees the flag, returns NaN for the bucket, and (driver.py) commits no state of that step at all.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from .compressors.base import Compressor
from .compressors.joined import ROOM, SMALL, joined
from .parts.field import HALVES, INTEGERS, ITEMSIZE, Field
from .parts.ops import Array, Feedback, Ops, Zeros
from .parts.payload import HEADER, message, open_message, pack, unpack
from .parts.requests import AllReduce, Scatter, Together
from .parts.tensor import StepInfo, TensorSpec


class Collective(NamedTuple):
    """One operation on one array of every rank. kind:
    'allreduce'   as AllReduce; the result is divided by `divisor`
    'allgather'   uint8; the result is a list by rank; `sizes` by rank, or None where they are not known, and then the arrays are messages
                  of payload.py
    'broadcast'   as allgather, by n broadcasts
    'alltoall'    uint8, `sizes` of the pieces for each rank; the result is a list by rank; `received`: the sizes of what arrives, by rank,
                  where that is not this rank's own entry of `sizes` from everyone, and () where it is not known, and then the pieces are
                  messages of payload.py
    `limits`: where sizes are not known, the most bytes that each rank can rightly send to this one.
    `label` tells a bucket's collectives of one round apart. `group`: 'all' ranks; those 'inside' this rank's node; 'between' the nodes, of
    their first ranks; or 'idle', in which this rank takes no part, and whose result is None (levels.py)."""

    kind: str
    array: Array
    label: str
    divisor: int = 1
    sizes: tuple[int, ...] | None = None
    dtype: str = "uint8"
    received: tuple[int, ...] | None = None
    group: str = "all"
    limits: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this rank puts in."""
        return len(self.array) * (1 if self.dtype in HALVES else ITEMSIZE[self.dtype])


class Outcome(NamedTuple):
    """What the exchange of one tensor gives."""

    output: Array
    state: dict[str, Array]


class Job(NamedTuple):
    """One tensor of a bucket at one step: its parts, the gradient as a flat float array, and where the result may be written: the
    gradient's own memory, once it is compressed. `watch`: what measures its exchange (recorder.Watch)."""

    spec: TensorSpec
    compressor: Any
    memory: Any
    communicator: Any
    grad: Array
    state: dict[str, Array]
    out: Array | None = None
    watch: Any = None


def exchange_tensor(ops: Ops, job: Job, info: StepInfo, flag: list[bool]) -> Generator[Any, Any, Outcome]:
    """One gradient, end to end. Sets flag[0] before its first request if the gradient is not finite."""
    spec, memory, state = job.spec, job.memory, job.state
    if not spec.size:
        return Outcome(ops.copy(job.grad), state)
    if not state:
        state = initial_state(ops, spec, (job.compressor, memory, job.communicator), info)
    closely = job.watch is not None and job.watch.closely
    running = compiled(ops, job, info, state) if ops.kernels else None
    if running:
        return (yield from running)
    current = dict(state)  # a memory may send twice: the second time finds what the first left behind

    def send(x: Array) -> Generator[Any, Any, Any]:
        wide = job.compressor.keeps_float64 and spec.dtype == "float64"
        x = ops.cast(x, "float64" if wide else "float32")
        if not ops.all_finite(x):  # a float64 that float32 cannot hold counts, too
            flag[0] = True
            x = ops.zeros(spec.size)
        done = yield from job.compressor.exchange(ops, x, spec, info, current, job.communicator)
        if closely:
            job.watch.sent(ops.norm(x), ops.norm(x - done.values()))
        kept = job.compressor.on_aggregate(ops, done.aggregate, spec, info, {**current, **done.state})
        changed = {**done.state, **kept}
        current.update(changed)
        return done._replace(state=changed, compressor=job.compressor)

    output, *changes = yield from memory.exchange(ops, send, job.grad, spec, info, state)
    return Outcome(output, _updated(state, *changes))


def compiled(ops: Ops, job: Job, info: StepInfo, state: dict[str, Array]) -> Generator[Any, Any, Outcome] | None:
    """The same by kernels that do the memory's work, too; None where these parts, or these values, are not for them."""
    feedback = job.memory.feedback(state)
    if not feedback:
        return None
    absorbed = job.memory.absorb(ops, job.grad, job.spec, info, state)
    state = {**state, **absorbed}
    grad = job.memory.incoming(job.grad, state)
    if grad is job.out:
        feedback = feedback._replace(spent=True)
    x = compensated(ops, grad, feedback) if job.watch is not None and job.watch.closely else None
    if one_pass(job.compressor, job.communicator):
        fused = job.compressor.fused(ops, grad, feedback, job.spec, info, state)
        if fused and x is not None:
            job.watch.sent(ops.norm(x), ops.norm(_unsent(ops, job, x, fused.payload, info) if fused.unsent is None else fused.unsent))
        return _exchange_fused(ops, job, info, state, fused) if fused else None
    rounds = job.compressor.fused_rounds(ops, grad, feedback, job.spec, info, state, job.out)
    return _exchange_rounds(ops, job, state, rounds, x) if rounds else None


def _unsent(ops: Ops, job: Job, x: Array, payload: Any, info: StepInfo) -> Array:
    decoded = ops.empty(job.spec.size)
    if not job.compressor.add_compiled(ops, decoded, payload, job.spec, True, 1):
        decoded = job.compressor.decompress(ops, payload, job.spec, info)
    return x - decoded


def compensated(ops: Ops, grad: Array, feedback: Feedback) -> Array:
    """What is compressed: the gradient itself where nothing is added."""
    return grad if feedback.residual is None else ops.sum_up(feedback, grad)


def one_pass(compressor: Any, communicator: Any) -> bool:
    """Whether the compressor's own `compress` and the communicator's `carry` are all there is to an exchange."""
    kind = type(compressor)
    return communicator.carries_payloads and kind.exchange is Compressor.exchange and kind.prepare is Compressor.prepare


def _exchange_fused(ops: Ops, job: Job, info: StepInfo, state: dict[str, Array], fused: Any) -> Generator[Any, Any, Outcome]:
    """The rest of exchange_tensor, where memory and compressor are done."""
    before = {**state, **fused.state}
    out = Zeros(job.out) if fused.zeroed else job.out
    done = yield from job.communicator.carry(ops, job.compressor, fused.payload, job.spec, info, fused.state, out)
    kept = job.compressor.on_aggregate(ops, done.aggregate, job.spec, info, before)
    unsent = {} if fused.unsent is None else {"residual": fused.unsent}
    return Outcome(done.aggregate, _updated(state, fused.state, done.state, kept, unsent, job.memory.marked(ops, done, before)))


def _exchange_rounds(ops: Ops, job: Job, state: dict[str, Array], rounds: Any, x: Array | None) -> Generator[Any, Any, Outcome]:
    before = None if x is None else ops.norm(x)  # the result may be written over the gradient
    aggregate, unsent, changed = yield from rounds
    if before is not None:
        job.watch.sent(before, ops.norm(unsent))
    return Outcome(aggregate, _updated(state, changed, {"residual": unsent}))


def initial_state(ops: Ops, spec: TensorSpec, parts: tuple[Any, Any, Any], info: StepInfo) -> dict[str, Array]:
    """What the compressor, memory and communicator of one tensor keep before its first step, by key."""
    compressor, memory, communicator = parts
    return {**memory.init(ops, spec, info), **compressor.init(ops, spec, info), **communicator.init(ops, compressor, spec, info)}


def replaced(old: dict[str, Array], new: Mapping[str, Array]) -> list[Array]:
    """Takes the arrays of a tensor's state out of it that its successor does not have: `ops.recycle` is to find no other reference."""
    return [old.pop(key) for key in list(old) if old[key] is not new.get(key)]


def _updated(state: Mapping[str, Array], *changes: Mapping[str, Array]) -> dict[str, Array]:
    """The state with what parts changed. A part may hand back all that it was given: what it did not change is not its to overwrite."""
    return {**state, **{key: array for change in changes for key, array in change.items() if array is not state.get(key)}}


def lockstep(generators: Sequence[Generator]) -> Generator[list[tuple[int, Any]], dict[int, Any], list[Any]]:
    """Runs generators side by side: yields each round's (index, request) of those that were answered, takes answers by index (those left
    out wait on), and returns what the generators returned."""
    results: list[Any] = [None] * len(generators)
    answers: dict[int, Any] = dict.fromkeys(range(len(generators)))
    running = len(generators)
    while running:
        requests = []
        for index, answer in answers.items():
            try:
                requests.append((index, generators[index].send(answer)))
            except StopIteration as stop:
                results[index] = stop.value
                running -= 1
        answers = (yield requests) if running else {}
    return results


def exchange_bucket(
    ops: Ops, jobs: Sequence[Job], info: StepInfo, digest: int, carry: Any
) -> Generator[list[Collective], list[Any], tuple[list[Outcome], bool]]:
    """All tensors of a bucket. Returns their outcomes, and whether every rank was finite (if not, the outputs mean nothing)."""
    flag = [False]
    units = list(_units(ops, jobs, info, flag))
    specs = [spec for spec, _ in units]
    tensors = lockstep([exchange for _, exchange in units])
    answers: Any = None
    all_finite, turn = True, 0
    while True:
        try:
            requests = _next_requests(tensors, answers)
        except StopIteration as stop:
            return [outcome for outcomes in stop.value for outcome in outcomes], all_finite
        groups = _by_kind(requests)
        fused = [_fused(ops, kind, group, specs, info, digest, flag, turn, carry) for kind, group in groups.items()]
        running = lockstep(fused)
        replies: Any = None
        while True:
            try:
                collectives = running.send(replies)
            except StopIteration as stop:
                done = stop.value
                break
            results = yield [collective for _, collective in collectives]
            replies = {index: result for (index, _), result in zip(collectives, results, strict=True)}
        answers = {}
        for group_answers, finite in done:
            answers.update(group_answers)
            all_finite = all_finite and finite
        turn += 1


def _units(ops: Ops, jobs: Sequence[Job], info: StepInfo, flag: list[bool]) -> Iterator[tuple[TensorSpec, Generator]]:
    """What is exchanged as one, and how, in order: small tensors that are neighbours and go the same way, and every other by itself."""
    for joins, group in groupby(jobs, lambda job: _joins(ops, job)):
        for some in _roomfuls(list(group)) if joins else ([job] for job in group):
            together = joint(ops, some, info) if len(some) > 1 else None
            if together:
                yield together
            else:
                yield from ((job.spec, _alone(ops, job, info, flag)) for job in some)


def _joins(ops: Ops, job: Job) -> Any:
    """What neighbours must have in common to be exchanged as one; None for a tensor that is exchanged by itself."""
    spec, state = job.spec, job.state
    if not (0 < spec.size <= SMALL and ops.kernels and job.watch is None and job.memory.elementwise and len(state) <= 1):
        return None
    if job.grad.dtype != np.float32 or (state and "residual" not in state) or not _stateless(job.compressor, job.communicator):
        return None
    return job.compressor, job.memory, job.communicator, spec.dtype, not state


@lru_cache(maxsize=256)
def _stateless(compressor: Any, communicator: Any) -> bool:
    """Whether an exchange is one pass, and leaves no state but the memory's."""
    changes = compressor.keeps_state or type(compressor).on_aggregate is not Compressor.on_aggregate
    return one_pass(compressor, communicator) and not changes and not communicator.keeps_state(compressor)


def _roomfuls(jobs: list[Job]) -> Iterator[list[Job]]:
    """As many neighbours as have room in the cache, and so on."""
    some, size = [], 0
    for job in jobs:
        if size + job.spec.size > ROOM:
            yield some
            some, size = [], 0
        some.append(job)
        size += job.spec.size
    yield some


def joint(ops: Ops, jobs: Sequence[Job], info: StepInfo) -> tuple[TensorSpec, Generator] | None:
    """The exchange of several tensors laid end to end; None where they must go one by one: there is no such form, or one is not finite."""
    first = jobs[0]
    found = joined(first.compressor, first.communicator, tuple(job.spec for job in jobs))
    if not found:
        return None
    compressor, spec = found
    grad = ops.concat([job.grad for job in jobs])
    state = {key: ops.concat([job.state[key] for job in jobs]) for key in first.state} or first.memory.init(ops, spec, info)
    fused = compressor.fused(ops, grad, first.memory.feedback(state), spec, info, {})
    whole = first._replace(spec=spec, compressor=compressor, grad=None, state={}, out=None)  # not to hold what is done with
    return (spec, _joint(ops, jobs, _exchange_fused(ops, whole, info, {}, fused))) if fused else None


def _joint(ops: Ops, jobs: Sequence[Job], exchange: Generator) -> Generator[Any, Any, list[Outcome]]:
    whole = yield from exchange
    outcomes, start = [], 0
    for job in jobs:
        end = start + job.spec.size
        output = whole.output[start:end]
        if job.out is not None:
            job.out[:] = output
            output = job.out
        outcomes.append(Outcome(output, {**job.state, **{key: array[start:end] for key, array in whole.state.items()}}))
        start = end
    return outcomes


def _alone(ops: Ops, job: Job, info: StepInfo, flag: list[bool]) -> Generator[Any, Any, list[Outcome]]:
    exchange = exchange_tensor(ops, job, info, flag)
    return [(yield from exchange if job.watch is None else job.watch.through(ops, job, exchange))]


def _next_requests(tensors: Generator, answers: Any) -> list[tuple[int, Any]]:
    """What the tensors want of the network next, once all that they want of each other (Together) is answered."""
    waiting: dict[int, Any] = {}
    while True:
        local: dict[Any, dict[int, Any]] = {}
        for index, request in tensors.send(answers):
            if isinstance(request, Together):
                local.setdefault(request.combine, {})[index] = request.value
            else:
                waiting[index] = request
        if not local:
            return sorted(waiting.items())
        answers = {}
        for combine, values in local.items():
            answers.update(zip(values, combine(list(values.values())), strict=True))


def _by_kind(requests: Sequence[tuple[int, Any]]) -> dict[str, list[tuple[int, Any]]]:
    """Requests that one collective can carry together, in an order that all ranks share."""
    groups: dict[str, list[tuple[int, Any]]] = {}
    for index, request in requests:
        if isinstance(request, AllReduce):
            kind = "sum-integers" if request.dtype in INTEGERS else "sum-" + request.dtype
        elif isinstance(request, Scatter):
            kind = "scatter"
        else:
            kind = "broadcast" if request.by_broadcast else "gather"
        groups.setdefault(kind, []).append((index, request))
    return dict(sorted(groups.items()))


def _fused(ops, kind, group, specs, info, digest, flag, turn, carry):
    """One collective for a group of requests of one kind: yields Collectives, returns ({index: result}, every rank finite)."""
    label = f"{kind}.{turn}"
    if kind.startswith("sum-"):
        return _fused_sum(ops, group, info, flag, label, carry)
    if kind == "scatter":
        return _fused_scatter(ops, group, specs, info, digest, flag, label, carry)
    return _fused_gather(ops, kind, group, specs, info, digest, flag, label, carry)


def _fused_sum(ops, group, info, flag, label, carry):
    """One element more than the arrays says whether a rank was not finite: NaN, or 1 among integers."""
    dtype = max((request.dtype for _, request in group), key=ITEMSIZE.__getitem__)
    if dtype in INTEGERS:
        tail, divisor = ops.arange(1) + int(flag[0]), 1
    elif dtype in HALVES:
        tail, divisor = ops.to_bytes(ops.full_nan(1) if flag[0] else ops.zeros(1), dtype), info.divisor
    else:
        tail, divisor = ops.cast(ops.full_nan(1) if flag[0] else ops.zeros(1), "float64" if dtype == "float64" else "float32"), info.divisor
    whole = ops.concat([*(request.array for _, request in group), tail])
    total = yield from carry(Collective("allreduce", whole, label, divisor, dtype=dtype))
    told = total[-len(tail) :]
    if dtype in INTEGERS:
        finite = not int(told[0])
    else:
        finite = ops.all_finite(ops.from_bytes(told, dtype) if dtype in HALVES else told)
    answers, at = {}, 0
    for index, request in group:
        answers[index] = total[at : at + len(request.array)]
        at += len(request.array)
    return answers, finite


def _fused_scatter(ops, group, specs, info, digest, flag, label, carry):
    """One message for each rank, with the shares of all tensors in it."""
    data = []
    for rank in range(info.size):
        pieces = [piece for _, request in group for piece in pack(ops, request.fields[rank], request.payloads[rank])]
        data.append(message(ops, pieces, digest=digest, step=info.step, finite=not flag[0]))
    sizes = tuple(len(piece) for piece in data)
    variable = any(field.variable for _, request in group for fields in request.fields for field in fields)
    mine = [request.fields[info.rank] for _, request in group]
    limits = (_most(mine),) * info.size
    collective = Collective("alltoall", ops.concat(data), label, sizes=sizes, received=() if variable else None, limits=limits)
    received = yield from carry(collective)
    return _opened(ops, group, [mine] * info.size, specs, info, digest, received)


def _fused_gather(ops, kind, group, specs, info, digest, flag, label, carry):
    pieces = [piece for _, request in group for piece in pack(ops, request.fields, request.payload)]
    finite = not flag[0] and all(request.finite for _, request in group)
    data = message(ops, pieces, digest=digest, step=info.step, finite=finite)
    by_rank = [[request.by_rank[rank] if request.by_rank else request.fields for _, request in group] for rank in range(info.size)]
    limits = tuple(_most(one) for one in by_rank)
    sizes = None if any(field.variable for one in by_rank for fields in one for field in fields) else limits
    collective = "broadcast" if kind == "broadcast" else "allgather"
    received = yield from carry(Collective(collective, data, label, sizes=sizes, limits=limits))
    return _opened(ops, group, by_rank, specs, info, digest, received)


def _most(fields_of_all: Sequence[Sequence[Field]]) -> int:
    """Bytes of the longest message with these fields."""
    return HEADER.size + sum(field.max_bytes for fields in fields_of_all for field in fields)


def _opened(ops, group, fields_by_rank, specs, info, digest, received):
    """({index: payloads in rank order}, every rank finite) from the ranks' messages, given the fields of each of the group's requests."""
    finite, by_rank = True, []
    for rank, (its_data, its_fields) in enumerate(zip(received, fields_by_rank, strict=True)):
        body, its_finite = open_message(ops, its_data, digest=digest, step=info.step, rank=rank)
        tensors = [(specs[index].name, fields) for (index, _), fields in zip(group, its_fields, strict=True)]
        by_rank.append(list(unpack(ops, body, tensors, rank)))
        finite = finite and its_finite
    answers = {index: [payloads[place] for payloads in by_rank] for place, (index, _) in enumerate(group)}
    return answers, finite
