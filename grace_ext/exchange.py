"""Requests, and the pipelines of one tensor and of one bucket: generators that yield collectives and are resumed with results.

Three layers, none of which blocks or knows a transport:
  exchange_tensor   memory -> compressor -> communicator -> memory, for one gradient; yields AllReduce and Gather requests
  exchange_bucket   runs the tensors of one bucket in lockstep and fuses each round's requests into one collective a kind;
                    yields lists of Collective, and returns outputs, new states and whether every rank was finite
  carry             (a transport's) expresses a collective that its engine lacks by ones that it has

Non-finite rule. A tensor whose compensated gradient is not finite takes part with zeros, so that sizes and rounds stay what the
peers expect, and raises the bucket's flag: in the header of gathered messages, as one appended NaN in summed ones. Every rank
sees the flag, returns NaN for the bucket, and (driver.py) commits no state of that step at all.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .ops import Array, Ops
from .parts import Field
from .payload import message, open_message, pack, unpack
from .spec import StepInfo, TensorSpec


class AllReduce(NamedTuple):
    """Mean (or sum, with divisor 1) over the ranks of a flat float array; a 16-bit `dtype` travels as such, is summed in float32 in
    rank order, divided, and rounded once. The result is float32 (float64 for float64)."""

    array: Array
    dtype: str


class Gather(NamedTuple):
    """Every rank's payload: the result is a list of payloads in rank order."""

    fields: Sequence[Field]
    payload: Sequence[Array]
    by_broadcast: bool = False


class Collective(NamedTuple):
    """One operation on one array of every rank. kind: 'allreduce' (float; result divided by `divisor`), 'allgather' (uint8; result a list
    by rank; `sizes` by rank, or None where they are not known, and then the arrays are messages of payload.py), 'broadcast' (as allgather,
    by n broadcasts), 'alltoall' (uint8, `sizes` of the pieces for each rank; result a list by rank). `label` tells a bucket's
    collectives of one round apart."""

    kind: str
    array: Array
    label: str
    divisor: int = 1
    sizes: tuple[int, ...] | None = None
    dtype: str = "uint8"


class Outcome(NamedTuple):
    """What the exchange of one tensor gives."""

    output: Array
    state: dict[str, Array]


@dataclass(frozen=True)
class Job:
    """One tensor of a bucket at one step: its parts, and the gradient as a flat float array."""

    spec: TensorSpec
    compressor: Any
    memory: Any
    communicator: Any
    grad: Array
    state: dict[str, Array]


def exchange_tensor(ops: Ops, job: Job, info: StepInfo, flag: list[bool]) -> Generator[Any, Any, Outcome]:
    """One gradient, end to end. Sets flag[0] before its first request if the gradient is not finite."""
    spec, memory, state = job.spec, job.memory, job.state
    if not spec.size:
        return Outcome(ops.copy(job.grad), state)
    if not state:
        state = {**memory.init(ops, spec, info), **job.compressor.init(ops, spec, info)}
    compensated = memory.before(ops, job.grad, spec, info, state)
    wide = job.compressor.keeps_float64 and spec.dtype == "float64"
    x = ops.cast(compensated, "float64" if wide else "float32")
    if not ops.all_finite(x):  # a float64 that float32 cannot hold counts, too
        flag[0] = True
        compensated = x = ops.zeros(spec.size)
    done = yield from job.compressor.exchange(ops, x, spec, info, state, job.communicator)
    sent = done.sent() if memory.uses_sent else None
    state = _updated(state, done.state, memory.after(ops, compensated, sent, spec, info, state))
    output, after = memory.on_aggregate(ops, done.aggregate, spec, info, state)
    return Outcome(output, _updated(state, after))


def _updated(state: Mapping[str, Array], *changes: Mapping[str, Array]) -> dict[str, Array]:
    """The state with what parts changed. A part may hand back all that it was given: what it did not change is not its to overwrite."""
    return {**state, **{key: array for change in changes for key, array in change.items() if array is not state.get(key)}}


def lockstep(generators: Sequence[Generator]) -> Generator[list[tuple[int, Any]], dict[int, Any], list[Any]]:
    """Runs generators side by side: yields each round's (index, request) of those still running, takes their results by index,
    and returns what the generators returned."""
    results: list[Any] = [None] * len(generators)
    answers: dict[int, Any] = dict.fromkeys(range(len(generators)))
    while answers:
        requests = []
        for index, answer in answers.items():
            try:
                requests.append((index, generators[index].send(answer)))
            except StopIteration as stop:
                results[index] = stop.value
        answers = (yield requests) if requests else {}
    return results


def exchange_bucket(
    ops: Ops, jobs: Sequence[Job], info: StepInfo, digest: int, carry: Any
) -> Generator[list[Collective], list[Any], tuple[list[Outcome], bool]]:
    """All tensors of a bucket. Returns their outcomes, and whether every rank was finite (if not, the outputs mean nothing)."""
    flag = [False]
    tensors = lockstep([exchange_tensor(ops, job, info, flag) for job in jobs])
    answers: Any = None
    all_finite, turn = True, 0
    while True:
        try:
            requests = tensors.send(answers)
        except StopIteration as stop:
            return stop.value, all_finite
        groups = _by_kind(requests)
        specs = [job.spec for job in jobs]
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


def _by_kind(requests: Sequence[tuple[int, Any]]) -> dict[str, list[tuple[int, Any]]]:
    """Requests that one collective can carry together, in an order that all ranks share."""
    groups: dict[str, list[tuple[int, Any]]] = {}
    for index, request in requests:
        if isinstance(request, AllReduce):
            kind = "sum-" + request.dtype
        else:
            kind = "broadcast" if request.by_broadcast else "gather"
        groups.setdefault(kind, []).append((index, request))
    return dict(sorted(groups.items()))


def _fused(ops, kind, group, specs, info, digest, flag, turn, carry):
    """One collective for a group of requests of one kind: yields Collectives, returns ({index: result}, every rank finite)."""
    if kind.startswith("sum-"):
        return _fused_sum(ops, group, info, flag, f"{kind}.{turn}", carry)
    return _fused_gather(ops, kind, group, specs, info, digest, flag, f"{kind}.{turn}", carry)


def _fused_sum(ops, group, info, flag, label, carry):
    dtype = group[0][1].dtype
    wide = "float64" if dtype == "float64" else "float32"
    tail = ops.full_nan(1) if flag[0] else ops.zeros(1)
    whole = ops.concat([*(request.array for _, request in group), ops.cast(tail, wide)])
    total = yield from carry(Collective("allreduce", whole, label, info.divisor, dtype=dtype))
    finite = ops.all_finite(total[-1:])
    answers, at = {}, 0
    for index, request in group:
        answers[index] = total[at : at + len(request.array)]
        at += len(request.array)
    return answers, finite


def _fused_gather(ops, kind, group, specs, info, digest, flag, label, carry):
    tensors = [(specs[index].name, request.fields) for index, request in group]
    pieces = [piece for _, request in group for piece in pack(ops, request.fields, request.payload)]
    data = message(ops, pieces, digest=digest, step=info.step, finite=not flag[0])
    variable = any(field.variable for _, fields in tensors for field in fields)
    sizes = None if variable else (len(data),) * info.size
    collective = "broadcast" if kind == "broadcast" else "allgather"
    received = yield from carry(Collective(collective, data, label, sizes=sizes))
    finite, by_rank = True, []
    for rank, its_data in enumerate(received):
        body, its_finite = open_message(ops, its_data, digest=digest, step=info.step, rank=rank)
        by_rank.append(list(unpack(ops, body, tensors, rank)))
        finite = finite and its_finite
    answers = {}
    for place, (index, _) in enumerate(group):
        answers[index] = [payloads[place] for payloads in by_rank]
    return answers, finite
