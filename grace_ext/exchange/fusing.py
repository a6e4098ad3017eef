"""Fuses the requests of a bucket's tensors: one round's requests of one kind travel in one collective."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import PayloadError
from ..parts.field import HALVES, INTEGERS, ITEMSIZE, Field
from ..parts.ops import Array, Flag, Ops
from ..parts.payload import pack, unpack
from ..parts.requests import AllReduce, RowSum, Scatter
from ..parts.tensor import StepInfo, TensorSpec
from .effects import Collective
from .message import HEADER, OTHERWISE, message, open_messages

#: Expresses a collective by those that an engine has (Transport.carry).
Carry = Callable[[Collective], Generator[Collective, Any, Any]]
#: Requests of one kind, each with the place of its tensor in the bucket.
Group = Sequence[tuple[int, Any]]
#: (the answer to each request, by the place of its tensor; whether every rank was finite)
Answers = tuple[dict[int, Any], Flag]


class Contents(NamedTuple):
    """Says what a message holds: the places of its tensors in the bucket, and the fields of each."""

    places: list[int]
    fields: list[Sequence[Field]]


@dataclass
class BucketStep:
    """What all collectives of one bucket share during one step. specs: of the tensors, in order. finite: whether every gradient of this
    rank has been finite so far."""

    ops: Ops
    info: StepInfo
    digest: int
    carry: Carry
    specs: Sequence[TensorSpec]
    finite: Flag = True


def all_of(flags: Sequence[Flag]) -> Flag:
    """Returns whether all flags hold."""
    return functools.reduce(operator.and_, {id(flag): flag for flag in flags if flag is not True}.values(), True)


def by_kind(requests: Sequence[tuple[int, Any]]) -> dict[str, Group]:
    """Groups requests that one collective can carry together, in an order that all ranks share."""
    groups: dict[str, list[tuple[int, Any]]] = {}
    for asked in requests:
        request = asked[1]
        if isinstance(request, AllReduce):
            kind = "sum-integers" if request.dtype in INTEGERS else "sum-" + request.dtype
        elif isinstance(request, RowSum):
            kind = "rows"
        elif isinstance(request, Scatter):
            kind = "scatter"
        else:
            kind = "broadcast" if request.by_broadcast else "gather"
        groups.setdefault(kind, []).append(asked)
    return dict(sorted(groups.items()))


def fused(step: BucketStep, kind: str, group: Group, turn: int) -> Generator[Collective, Any, Answers]:
    """Carries a group of requests of one kind by one collective, in round `turn` of the bucket."""
    label = f"{kind}.{turn}"
    if kind.startswith("sum-"):
        return _sum(step, group, label)
    if kind == "rows":
        return _sum_rows(step, group, label)
    if kind == "scatter":
        return _scatter(step, group, label)
    return _gather(step, kind, group, label)


def _sum(step: BucketStep, group: Group, label: str) -> Generator[Collective, Any, Answers]:
    """Sums the arrays, and one element more. Among floats it is the lowest bit of the digest, or NaN if a gradient was not finite: so ranks
    that sum other things are found out although sums have no header. Among integers it is 1 if a gradient was not finite."""
    ops, finite = step.ops, step.finite
    dtype = max((request.dtype for _, request in group), key=ITEMSIZE.__getitem__)
    divisor = step.info.divisor
    mark = ops.zeros(1) + (step.digest & 1)
    if finite is not True:
        mark = ops.where(finite, mark, ops.full_nan(1))
    if dtype in INTEGERS:
        tail, divisor = ops.arange(1) + (finite ^ True), 1
    elif dtype in HALVES:
        tail = ops.to_bytes(mark, dtype)
    else:
        tail = ops.cast(mark, "float64" if dtype == "float64" else "float32")
    whole = ops.concat([*(request.array for _, request in group), tail])
    total = yield from step.carry(Collective("allreduce", whole, label, divisor, dtype=dtype))
    told = total[-len(tail) :]
    if dtype in INTEGERS:
        all_finite = (told == 0).all()
    else:
        said = ops.from_bytes(told, dtype) if dtype in HALVES else told
        all_finite = ops.all_finite(said)
        expected = (step.digest & 1) * step.info.size / divisor
        alike = (abs(said - expected) <= 0.5 / divisor + 0.01 * expected).all()  # 16-bit sums are rounded
        ops.require(alike | (all_finite ^ True), f"was summed with a payload that {OTHERWISE}")
    return _summed(group, total), all_finite


def _sum_rows(step: BucketStep, group: Group, label: str) -> Generator[Collective, Any, Answers]:
    """Sums the arrays over the ranks that hold rows of the same matrices, and one element more: NaN if a gradient was not finite. Who hears
    of such a gradient here tells the other replicas in the next round."""
    ops = step.ops
    whole = ops.concat([*(request.array for _, request in group), ops.where(step.finite, ops.zeros(1), ops.full_nan(1))])
    total = yield Collective("allreduce", whole, label, dtype="float32", group="rows")
    all_finite = ops.all_finite(total[-1:])
    step.finite = step.finite & all_finite
    return _summed(group, total), all_finite


def _summed(group: Group, total: Array) -> dict[int, Array]:
    """Cuts each request's sum out of the total, in order."""
    answers, at = {}, 0
    for index, request in group:
        answers[index] = total[at : at + len(request.array)]
        at += len(request.array)
    return answers


def _scatter(step: BucketStep, group: Group, label: str) -> Generator[Collective, Any, Answers]:
    """Sends each rank one message, with its shares of all tensors."""
    ops, info = step.ops, step.info
    pieces: list[list[Array]] = [[] for _ in range(info.size)]
    for _, request in group:
        for rank, fields in request.fields.items():
            pieces[rank] += pack(ops, fields, request.payloads[rank])
    data = [message(ops, its, digest=step.digest, step=info.step, finite=step.finite) for its in pieces]
    sizes = tuple(len(piece) for piece in data)
    variable = any(field.variable for _, request in group for fields in request.fields.values() for field in fields)
    places = [index for index, request in group if info.rank in request.fields]
    mine = Contents(places, [request.fields[info.rank] for _, request in group if info.rank in request.fields])
    limits = (_longest(mine),) * info.size
    collective = Collective("alltoall", ops.concat(data), label, sizes=sizes, received=() if variable else None, limits=limits)
    received = yield from step.carry(collective)
    return _opened(step, group, [mine] * info.size, received)


def _gather(step: BucketStep, kind: str, group: Group, label: str) -> Generator[Collective, Any, Answers]:
    """Sends all ranks one message, with the payloads of all tensors."""
    ops, info = step.ops, step.info
    pieces = [piece for _, request in group for piece in pack(ops, request.fields, request.payload)]
    finite = all_of([step.finite, *(request.finite for _, request in group)])
    data = message(ops, pieces, digest=step.digest, step=info.step, finite=finite)
    by_rank = _by_rank(group, info.size)
    limits = tuple(_longest(one) for one in by_rank)
    sizes = None if any(field.variable for one in by_rank for fields in one.fields for field in fields) else limits
    collective = "broadcast" if kind == "broadcast" else "allgather"
    received = yield from step.carry(Collective(collective, data, label, sizes=sizes, limits=limits))
    return _opened(step, group, by_rank, received)


def _by_rank(group: Group, size: int) -> list[Contents]:
    """Returns, for each rank, what its message holds."""
    if not any(request.by_rank for _, request in group):
        return [Contents([index for index, _ in group], [request.fields for _, request in group])] * size
    by_rank = [Contents([], []) for _ in range(size)]
    for index, request in group:
        its = dict.fromkeys(range(size), request.fields) if request.by_rank is None else request.by_rank
        for rank, fields in its.items():
            by_rank[rank].places.append(index)
            by_rank[rank].fields.append(fields)
    return by_rank


def _longest(contents: Contents) -> int:
    """Returns the bytes of the longest message that holds this."""
    return HEADER.size + sum(field.max_bytes for fields in contents.fields for field in fields)


def _opened(step: BucketStep, group: Group, by_rank: Sequence[Contents], received: Sequence[Array]) -> Answers:
    """Reads the ranks' messages, given what each of them holds: the answer to each request is its payloads, by rank."""
    answers: dict[int, list[Any]] = {index: [] for index, _ in group}
    bodies, finite = open_messages(step.ops, received, digest=step.digest, step=step.info.step)
    for rank, (body, (places, fields)) in enumerate(zip(bodies, by_rank, strict=True)):
        names = (step.specs[place].name for place in places)
        try:
            for place, payload in zip(places, unpack(step.ops, body, zip(names, fields, strict=True), rank), strict=True):
                answers[place].append(payload)
        except PayloadError:
            step.ops.judged([])  # what is wrong with the header, if that was put off, says more
            raise
    return answers, finite
