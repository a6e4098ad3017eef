"""Compares specs on one task: score with spread, bytes, time to encode and decode, and the predicted exchange on a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..cluster import LocalCluster
from ..composition.making import grace
from ..errors import ParameterError
from ..planning.cached import traces
from ..planning.candidates import candidates
from ..planning.cost import Link
from ..planning.network import OnLink
from ..planning.plan import Model
from .task import Task
from .training import Run, Trainings, batches, gradient

#: The steps that are timed, after one that is not.
TIMED = 20


@dataclass(frozen=True)
class Row:
    """Holds what the trainings with one spec came to, in means over the seeds.

    sd: the standard deviation of the scores, None with one seed. smaller: bytes of dense training over `nbytes`. rate: the learning rate.
    encode_ms, decode_ms: of rank 0 per step, on this machine, in one thread; None if they were not measured. exchange_ms: the predicted
    time of one exchange, None for a policy that changes from step to step, of which none can be predicted. front: whether no other spec
    has a score as good for fewer bytes, or a better one for as many."""

    spec: str
    score: float
    sd: float | None
    scores: list[float]
    nbytes: float
    smaller: float
    rate: float
    encode_ms: float | None
    decode_ms: float | None
    exchange_ms: float | None
    front: bool


def rows(its: Task, runs: dict[str, list[Run]], times: dict[str, tuple[float, float]], exchanges: dict[str, float]) -> list[Row]:
    """Returns a row per spec, in the order of `runs`, whose first spec is the dense one. times: ms to encode and decode by spec, where they
    were measured. exchanges: predicted ms by spec."""
    means = {spec: (statistics.mean(run.score for run in of), statistics.mean(run.nbytes for run in of)) for spec, of in runs.items()}
    dense, best, made = next(iter(means.values()))[1], front(means, its.higher_is_better), []
    for spec, of in runs.items():
        score, nbytes = means[spec]
        scores = [run.score for run in of]
        sd, smaller = statistics.stdev(scores) if len(of) > 1 else None, dense / nbytes if nbytes else float("inf")
        encode, decode = times.get(spec, (None, None))
        made.append(Row(spec, score, sd, scores, nbytes, smaller, of[0].rate, encode, decode, exchanges.get(spec), spec in best))
    return made


def front(means: dict[str, tuple[float, float]], higher_is_better: bool) -> set[str]:
    """Returns the specs of the Pareto front. means: (score, bytes) by spec."""
    sign = 1 if higher_is_better else -1
    points = {spec: (sign * score, -nbytes) for spec, (score, nbytes) in means.items()}

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other[0] >= mine[0] and other[1] >= mine[1] and other != mine for other in points.values())

    return {spec for spec, mine in points.items() if not beaten(mine) and mine[0] == mine[0]}


def timed(its: Task, spec: str, ranks: int) -> tuple[float, float]:
    """Returns the milliseconds in which rank 0 encodes and decodes a step, in this process; means over TIMED steps of the task's own
    gradients, with weights that do not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = its.model()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cluster = LocalCluster(grace(spec), ranks, framework="torch")
    metrics = cluster.measure(every=TIMED + 1)[0]  # its close measurement is made at the first step, which the times leave out
    for _, chosen in zip(range(TIMED + 1), batches(its, 0, ranks), strict=False):
        cluster.step([gradient(its, model, named, rows) for rows in chosen], lr=its.lr)
    total = metrics.report()["total"]
    return 1000 * total["encode_seconds"], 1000 * total["decode_seconds"]


def computing(its: Task) -> float:
    """Returns the seconds of computing of one rank's forward and backward pass, in one thread: the median of TIMED."""
    model, seconds = its.model(), []
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _, chosen in zip(range(TIMED), batches(its, 0, 1), strict=False):
        began = time.thread_time()
        gradient(its, model, named, chosen[0])
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


def predicted(its: Task, specs: Sequence[str], link: Link, workers: int, tell: Callable[[str], None]) -> dict[str, float]:
    """Returns the predicted ms of an exchange of the task's gradients, by spec; nothing for specs that cannot be predicted, such as
    policies that change from step to step. One worker per node; the first spec is the dense one."""
    model = its.model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    steady = []
    for spec in specs:
        try:
            candidates([spec], workers)
        except ParameterError:
            continue
        steady.append(spec)
    chosen = candidates(steady, workers)
    planned = Model(traces(chosen, shapes, fresh=False, tell=tell), workers)
    by_text = {str(grace(spec)): spec for spec in steady}
    return {by_text[row.spec]: row.exchange_ms for row in planned.rows(OnLink(link), link) if row.spec in by_text}


def compare(
    name: str,
    specs: Sequence[str],
    *,
    seeds: int = 3,
    ranks: int = 2,
    rates: Sequence[float] = (1.0,),
    jobs: int | None = None,
    link: Link,
    workers: int = 8,
    tick: Callable[[int], None] = lambda done: None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Compares specs, the first of which is the dense one, on the task of this name. The seeds are 0, 1, ...; for the others see
    `Trainings.runs` and `predicted`. tick: is told how many trainings have ended. tell: is told what is timed."""
    with Trainings(name, jobs) as trainings:
        runs, its = trainings.runs(specs, range(seeds), rates, tick, ranks=ranks), trainings.task
    times = {}
    for spec in specs:
        tell(spec)
        times[spec] = timed(its, spec, ranks)
    return rows(its, runs, times, predicted(its, specs, link, workers, tell))
