"""Exchanges all tensors of a bucket side by side: each round's requests are fused into one collective for each kind."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..parts.ops import Flag, Ops
from ..parts.requests import Together
from ..parts.tensor import StepInfo, TensorSpec
from .effects import Collective
from .fusing import BucketStep, Carry, all_of, by_kind, fused
from .merge import merge, merge_key, runs
from .tensor import Job, NotFinite, Outcome, exchange_tensor

#: Yields lists of collectives and is resumed with their results; returns the outcomes, and whether every rank was finite.
BucketExchange = Generator[list[Collective], list[Any], tuple[list[Outcome], Flag]]
Requests = list[tuple[int, Any]]


def exchange_bucket(ops: Ops, jobs: Sequence[Job], info: StepInfo, digest: int, carry: Carry) -> BucketExchange:
    """Exchanges all tensors of a bucket. If some rank was not finite, the outcomes mean nothing."""
    specs, exchanges = [], []
    for spec, exchange in _units(ops, jobs, info):
        specs.append(spec)
        exchanges.append(exchange)
    step = BucketStep(ops, info, digest, carry, specs)
    tensors = side_by_side(exchanges)
    answers: Any = None
    all_finite: Flag = True
    turn = 0
    while True:
        try:
            requests = _next_requests(step, tensors, answers)
        except StopIteration as stop:
            found = [outcome for done in stop.value for outcome in ([done] if isinstance(done, Outcome) else done)]
            return found, all_of([all_finite, *(outcome.finite for outcome in found)])
        running = side_by_side([fused(step, kind, group, turn) for kind, group in by_kind(requests).items()])
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
            all_finite = all_finite & finite
        turn += 1


def side_by_side(generators: Sequence[Generator[Any, Any, Any]]) -> Generator[Requests, dict[int, Any], list[Any]]:
    """Runs generators side by side: yields each round's (index, request), and takes answers by index. Generators that are not answered
    wait on. Returns what the generators returned."""
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


def _units(ops: Ops, jobs: Sequence[Job], info: StepInfo) -> Iterator[tuple[TensorSpec, Generator[Any, Any, Outcome | list[Outcome]]]]:
    """Yields what is exchanged as one, in order: runs of small neighbours that go through the same parts, and every other tensor."""
    for key, group in groupby(jobs, lambda job: merge_key(ops, job)):
        for run in runs(ops, list(group)) if key else ([job] for job in group):
            merged = merge(ops, run, info) if len(run) > 1 else None
            if merged:
                yield merged
            else:
                for job in run:
                    exchange = exchange_tensor(ops, job, info)
                    yield job.spec, exchange if job.watch is None else job.watch.through(ops, job, exchange)


def _next_requests(step: BucketStep, tensors: Generator[Requests, dict[int, Any], list[Any]], answers: Any) -> Requests:
    """Returns the tensors' next requests to the network, once all that they ask of the bucket itself (NotFinite, Together) is answered."""
    waiting: Requests = []
    together: dict[Any, dict[int, Any]] = {}
    while True:
        told: dict[int, None] = {}
        for asked in tensors.send(answers):
            index, request = asked
            if isinstance(request, NotFinite):
                told[index] = None
                step.finite = step.finite & request.finite
            elif isinstance(request, Together):
                together.setdefault(request.combine, {})[index] = request.value
            else:
                waiting.append(asked)
        if told:  # what these tensors ask next belongs to the same round
            answers = told
        elif together:
            answers = {}
            for combine, values in together.items():
                values = dict(sorted(values.items()))
                answers.update(zip(values, combine(list(values.values())), strict=True))
            together = {}
        else:
            return sorted(waiting, key=itemgetter(0))
