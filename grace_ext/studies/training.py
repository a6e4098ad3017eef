"""Trains a task on simulated ranks, and many trainings side by side, one process per core."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..cluster import LocalCluster
from ..composition.grace import Grace
from ..composition.making import grace
from ..errors import UnsupportedError
from ..frameworks.optimizers import check_optimizer
from ..planning.bench import cores
from .task import Task, task

#: Entries of a vote have magnitude 1, whatever the gradient's magnitudes are: votes use this share of a task's learning rate.
RATE_OF_VOTES = 1 / 20


@dataclass(frozen=True)
class Run:
    """Holds what one training came to. score: on the test data, at the end; nbytes: that rank 0 handed to collectives, mean per step;
    curve: (step, score) at every `every`-th step; total_error: the sum over steps and tensors of ||C(p) - p||^2 on rank 0 (NaN unless
    it was asked for)."""

    spec: str
    seed: int
    rate: float
    score: float
    nbytes: float
    curve: list[tuple[int, float]]
    total_error: float = math.nan


def check(g: Grace) -> None:
    """Raises UnsupportedError for a spec that these trainings cannot be of."""
    if g.diverges:
        raise UnsupportedError(
            f"{g}: its memory gives each rank a model of its own, and a comparison trains one model; use memory 'residual'"
        )
    if g.privacy is not None:
        raise UnsupportedError(
            f"{g}: a comparison trains without noise, of which docs/privacy.md shows the cost in accuracy; give only what is behind '|'"
        )


def base_rate(g: Grace, its: Task) -> float:
    """Returns the learning rate of the task for this spec: its own, or a share of it for votes."""
    return its.lr * (RATE_OF_VOTES if any(leaf.compressor.result == "vote" for leaf in g.leaves) else 1.0)


def optimizer_for(g: Grace, model: torch.nn.Module, its: Task, rate: float) -> torch.optim.Optimizer:
    """Returns the task's optimizer; without momentum for votes, and if a memory is the momentum. Raises IncompatiblePartsError if it
    does not fit the memory."""
    optimizer = its.optimizer(model.parameters(), rate)
    votes = any(leaf.compressor.result == "vote" for leaf in g.leaves)
    for group in optimizer.param_groups:
        if "momentum" in group and (votes or any(memory.is_momentum for memory in g.memories)):
            group["momentum"] = 0.0
        check_optimizer(g, type(optimizer).__name__, group)
    return optimizer


def batches(its: Task, seed: int, ranks: int) -> Iterator[list[torch.Tensor]]:
    """Yields the indices of each rank's examples, step by step. They depend on seed, ranks and batch alone."""
    draw, size = torch.Generator().manual_seed(seed), its.batch * ranks
    examples = len(its.train[0])
    if examples < size:
        raise UnsupportedError(
            f"{ranks} ranks with {its.batch} examples each need {size} examples per step; the task has {examples}: use fewer ranks, or a "
            "smaller batch in the task"
        )
    while True:
        for chosen in torch.randperm(examples, generator=draw).split(size)[: examples // size]:
            yield [chosen[rank::ranks] for rank in range(ranks)]


def train(
    its: Task,
    spec: str,
    seed: int,
    *,
    rate: float = 1.0,
    ranks: int = 2,
    steps: int = 0,
    every: int = 0,
    total_error: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Run:
    """Trains once, by LocalCluster, which gives the results of real ranks.

    rate: the learning rate, in multiples of the task's (for votes: of a twentieth of it). steps: 0 for the task's. every: the steps from
    one point of the curve to the next, 0 for none. total_error: whether to measure it, which costs passes over the data. tick: is called
    after every step."""
    g, steps = grace(spec), steps or its.steps
    check(g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = its.model()
        optimizer = optimizer_for(g, model, its, peak := rate * base_rate(g, its))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.2, cycle_momentum=False)
        cluster = LocalCluster(g, ranks, framework="torch")
        metrics = cluster.measure(every=1)[0] if total_error else None
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sent, curve = [], []
        model.train()
        for step, (_, chosen) in enumerate(zip(range(steps), batches(its, seed, ranks), strict=False), start=1):
            gradients = [gradient(its, model, named, rows) for rows in chosen]
            mean = cluster.step(gradients, lr=optimizer.param_groups[0]["lr"])
            for name, p in named.items():
                p.grad = mean[name]
            optimizer.step()
            schedule.step()
            sent.append(cluster.wire_bytes[0])
            if every and step % every == 0:
                curve.append((step, its.scored(model)))
            tick()
        error = float(metrics.report()["total"]["total_error"]) if metrics else math.nan
        return Run(spec, seed, peak, its.scored(model), statistics.mean(sent), curve, error)


def gradient(its: Task, model: torch.nn.Module, named: dict[str, torch.nn.Parameter], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients of the loss of these examples by parameter; zeros for a parameter that it does not depend on."""
    inputs, targets = (part[rows] for part in its.train)
    found = torch.autograd.grad(its.loss(model(inputs), targets), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def _run(name: str, spec: str, seed: int, options: dict[str, Any]) -> Run:
    torch.set_num_threads(1)  # one process per core; and sums in the same order on every machine
    return train(task(name), spec, seed, **options)


def _end_with_parent() -> None:
    """Makes this process of a pool end if the one that started it is killed. Otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Trainings:
    """Runs trainings of one task side by side. A context; options are those of `train`.

    name: of the task. jobs: the number of processes, by default one per core that this process may use."""

    #: Learning rates are tried on trainings with this seed, which is none of those that are reported.
    tuning_seed = 1_000_003

    def __init__(self, name: str, jobs: int | None = None):
        self.name, self.task = name, task(name)
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(jobs or cores(), mp_context=context, initializer=_end_with_parent)

    def __enter__(self) -> Trainings:
        return self

    def __exit__(self, *raised: object) -> None:
        self.pool.shutdown(wait=raised[0] is None, cancel_futures=True)

    def start(self, spec: str, seed: int, **options: Any) -> Future[Run]:
        return self.pool.submit(_run, self.name, spec, seed, options)

    def runs(
        self,
        specs: Sequence[str],
        seeds: Sequence[int],
        rates: Sequence[float] = (1.0,),
        tick: Callable[[int], None] = lambda done: None,
        **options: Any,
    ) -> dict[str, list[Run]]:
        """Trains each spec with each seed, at the one of `rates` that does best for it in a training with another seed. tick: is told how
        many trainings have ended, of `amount(...)`."""
        rate = dict.fromkeys(specs, rates[0])
        if len(rates) > 1:
            tried = {spec: [self.start(spec, self.tuning_seed, rate=each, **options) for each in rates] for spec in specs}
            rate |= {spec: rates[self._best([_ended(run, tick).score for run in runs])] for spec, runs in tried.items()}
        started = {spec: [self.start(spec, seed, rate=rate[spec], **options) for seed in seeds] for spec in specs}
        return {spec: [_ended(run, tick) for run in runs] for spec, runs in started.items()}

    def _best(self, scores: Sequence[float]) -> int:
        sign = 1 if self.task.higher_is_better else -1
        return max(range(len(scores)), key=lambda i: sign * scores[i] if scores[i] == scores[i] else float("-inf"))


def amount(specs: Sequence[str], seeds: Sequence[int], rates: Sequence[float] = (1.0,)) -> int:
    """Returns the number of trainings that `Trainings.runs` makes."""
    return len(specs) * (len(seeds) + (len(rates) if len(rates) > 1 else 0))


def _ended(run: Future[Run], tick: Callable[[int], None]) -> Run:
    found = run.result()
    tick(1)
    return found
