"""Runs one rank of time_to_accuracy.py: trains until the target score is reached; rank 0 writes the results.

    horovodrun --gloo -np 2 python benchmarks/time_to_accuracy/rank.py JOB.json

JOB.json has task, spec ('dense' for Horovod's own optimizer), seed, limit (seconds of training) and out, a file that is rewritten at every
evaluation. The clock stops during evaluations.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.time_to_accuracy.tasks import SMOOTH, TASKS, Task

WARM_UP, ALONE = 3, 7


def optimizer_for(task: Task, model: torch.nn.Module, spec: str) -> Any:
    optimizer = task.make_optimizer(model, task.lr)
    return hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), compression=None if spec == "dense" else spec
    )


def step(task: Task, model: torch.nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    task.loss(model, batch).backward()
    optimizer.step()


def rehearse(task: Task, job: dict[str, Any]) -> dict[str, float]:
    """Trains a model that is thrown away: first steps with the exchange, to connect and to load code; then steps without it, to time the
    computation alone while the other ranks compute, too."""
    model, batches = task.make_model(), task.batches(10_000 + job["seed"], hvd.rank(), hvd.size())
    began, optimizer = time.perf_counter(), optimizer_for(task, model, job["spec"])
    for _ in range(WARM_UP):
        step(task, model, optimizer, next(batches))
    warm_up = time.perf_counter() - began
    model, seconds = task.make_model(), []
    optimizer = task.make_optimizer(model, task.lr)
    hvd.barrier()
    for _ in range(ALONE):
        began = time.perf_counter()
        step(task, model, optimizer, next(batches))
        seconds.append(time.perf_counter() - began)
    return {"warm_up_seconds": warm_up, "compute_ms": 1000 * statistics.median(seconds)}


class Clock:
    """Counts the seconds of training on the slowest rank."""

    def __init__(self) -> None:
        self.seconds = self.evaluating = 0.0
        self._since = time.perf_counter()

    def evaluate(self, task: Task, model: torch.nn.Module) -> float:
        """Stops the clock and returns the mean score over all ranks' shares."""
        now = time.perf_counter()
        mine = (self.seconds + now - self._since, task.score(model, hvd.rank(), hvd.size()))
        everyone = hvd.allgather_object(mine, name="evaluation")
        self.seconds = max(seconds for seconds, _ in everyone)
        self._since = time.perf_counter()
        self.evaluating += self._since - now
        return sum(score for _, score in everyone) / len(everyone)


def train(task: Task, job: dict[str, Any], facts: dict[str, Any]) -> None:
    """Trains until the mean of the last SMOOTH scores reaches the target, or the time limit is over."""
    torch.manual_seed(job["seed"])
    model = task.make_model()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = optimizer_for(task, model, job["spec"])
    sent, times, curve = [], [], []
    hvd.barrier()
    clock = Clock()
    for number, batch in enumerate(task.batches(job["seed"], hvd.rank(), hvd.size()), 1):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = task.lr * min(1.0, number / task.rise)
        step(task, model, optimizer, batch)
        times.append(time.perf_counter() - began)
        sent.append(getattr(optimizer, "wire_bytes", 0))
        if number % task.every:
            continue
        score = clock.evaluate(task, model)
        curve.append([number, round(clock.seconds, 3), round(score, 4)])
        last = [score for _, _, score in curve[-SMOOTH:]]
        score = statistics.mean(last)
        reached = len(last) == SMOOTH and task.reached(score)
        row = {**facts, "reached": reached, "seconds": clock.seconds, "steps": number, "score": score}
        row |= {"step_ms": 1000 * statistics.median(times), "bytes_per_step": statistics.mean(sent) or dense_bytes(model)}
        over = reached or clock.seconds > job["limit"]
        write(job, {**row, "evaluation_seconds": clock.evaluating, "over": over, "curve": curve})
        if over:
            return
    raise RuntimeError(f"{job['spec']}: no more examples were drawn")


def dense_bytes(model: torch.nn.Module) -> int:
    """Returns the bytes that Horovod's own optimizer hands to all-reduce, which it does not count itself."""
    return sum(p.nbytes for p in model.parameters())


def write(job: dict[str, Any], row: dict[str, Any]) -> None:
    if hvd.rank() == 0:
        fresh = Path(job["out"] + ".new")
        fresh.write_text(json.dumps(row))
        fresh.replace(job["out"])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    hvd.init()
    torch.set_num_threads(1)
    task = TASKS[job["task"]]()
    train(task, job, rehearse(task, job))
    hvd.shutdown()


if __name__ == "__main__":
    main()
