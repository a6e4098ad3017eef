"""Runs replicas of torchft_job.py as processes, and makes again in this process what they have counted."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import grace_ext

from . import training
from .launch import JOBS, environment

JOB = [sys.executable, str(JOBS / "torchft_job.py")]


class Gave(NamedTuple):
    """An exchange that did not fail, of one replica. takes_part: with its gradients, not with zeros."""

    name: int
    step: int
    quorum: int
    size: int
    rank: int
    takes_part: bool


class Step(NamedTuple):
    """A step that a replica counted. digest: of its model after it."""

    about: Gave
    digest: str
    time: float


class Replicas:
    """Runs replicas as a context manager. least: how many are enough to go on."""

    def __init__(self, folder: Path, mode: str, least: int, spec: str, limit: float = 300):
        self.folder, self.options, self.deadline = folder, [mode, str(least), spec], time.monotonic() + limit
        self.running: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> Replicas:
        self._errors = (self.folder / "errors").open("w")
        command = [*JOB, "lighthouse", self.options[1]]
        self._lighthouse = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._port = self._lighthouse.stdout.readline().strip()
        return self

    def __exit__(self, *_: Any) -> None:
        for process in (*self.running.values(), self._lighthouse):
            process.kill()
            process.wait()
        self._lighthouse.stdout.close()
        self._errors.close()

    def start(self, name: int, *events: str) -> None:
        """Starts a replica. events: see torchft_job.py."""
        command = [*JOB, str(self.folder), str(name), self._port, *self.options, *events]
        limited = {**environment(), "RUST_LOG": "warn"}
        self.running[name] = subprocess.Popen(command, env=limited, stdout=self._errors, stderr=self._errors)

    def stop(self, *names: int) -> None:
        """Ends these replicas after the same step."""
        (self.folder / "new").write_text(str(self.last() + 8))
        (self.folder / "new").rename(self.folder / "stop")
        for name in names:
            assert self.running[name].wait(max(1.0, self.deadline - time.monotonic())) == 0, name

    def until(self, what: str, condition: Callable[[], Any], dead: tuple[int, ...] = ()) -> None:
        """Waits until the condition is true. Raises AssertionError if a replica that should live has ended, or the time is over."""
        while not condition():
            ended = [name for name, process in self.running.items() if name not in dead and process.poll() is not None]
            if ended or time.monotonic() > self.deadline:
                why = f"replicas {ended} ended" if ended else "it took too long"
                lines = [line for line in (self.folder / "errors").read_text().splitlines() if "[INFO]" not in line]
                raise AssertionError(f"waiting for {what}: {why}; last step {self.last()}\n" + "\n".join(lines[-60:]))
            time.sleep(0.05)

    def _lines(self, kind: str) -> Iterator[tuple[Gave, list[str]]]:
        for file in self.folder.glob("*.txt"):
            for line in file.read_text().splitlines(keepends=True):
                words = line.split()
                if line.endswith("\n") and words[0] == kind:
                    step, quorum, size, rank, takes_part = map(int, words[1:6])
                    yield Gave(int(file.stem), step, quorum, size, rank, bool(takes_part)), words[6:]

    def gave(self) -> list[Gave]:
        """Returns the exchanges that did not fail, of all replicas."""
        return [about for about, _ in self._lines("GAVE")]

    def steps(self, *names: int) -> list[Step]:
        """Returns the steps that these replicas counted (by default: all of them)."""
        return [Step(about, digest, float(when)) for about, (digest, when) in self._lines("STEP") if not names or about.name in names]

    def last(self, *names: int) -> int:
        """Returns the last step that one of these replicas counted, -1 for none."""
        return max((step.about.step for step in self.steps(*names)), default=-1)

    def said(self, name: int) -> list[str]:
        """Returns what grace_ext logged in a replica."""
        return [line[4:] for line in (self.folder / f"{name}.txt").read_text().splitlines() if line.startswith("LOG ")]


def replay(spec: str, gave: list[Gave], steps: list[Step]) -> dict[str, np.ndarray]:
    """Makes the steps that replicas counted, each in a LocalCluster of the replicas that took part, and returns the final weights. A
    replica that has counted the step before keeps its own memory; another one starts with what all share, and zeros."""
    net = training.make_model()
    optimizer = training.make_optimizer(net)
    memories: dict[int, dict[str, Any]] = {}
    for number in range(max(step.about.step for step in steps) + 1):
        (quorum,) = {step.about.quorum for step in steps if step.about.step == number}
        there = sorted((g.rank, g.name) for g in gave if (g.step, g.quorum) == (number, quorum) and g.takes_part)
        names = [name for _, name in there]
        cluster = grace_ext.LocalCluster(spec, len(names), framework="torch")
        if not memories:  # the first step
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(0.01 * names[0])
        else:
            some = next(iter(memories.values()))
            states = [{**memories.get(name, anew(some)), "rank": rank, "size": len(names)} for rank, name in enumerate(names)]
            cluster.load_state_dict({"version": 1, "ranks": states})
        mean = cluster.step([gradients(net, name, number) for name in names], lr=0.05)
        for name, parameter in net.named_parameters():
            parameter.grad = mean[name]
        optimizer.step()
        after = dict(zip(names, cluster.state_dict()["ranks"], strict=True))
        counted = [step.about.name for step in steps if step.about.step == number]
        memories = {name: after.get(name, anew(after[names[0]])) for name in counted}
    return training.weights_of(net)


def anew(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the memory of a replica that has not sent any gradient: what all share, and zeros."""
    return {**state, "state": {path: 0 * x if path.startswith("residual/") else x for path, x in state["state"].items()}}


def gradients(net: torch.nn.Module, name: int, step: int) -> dict[str, torch.Tensor]:
    """Returns the gradients of a replica at a step."""
    net.zero_grad()
    training.loss_of(net, name, step).backward()
    return {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in net.named_parameters()}
