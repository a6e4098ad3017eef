"""Runs a real elastic job: one of three workers is killed, and one joins later. benchmarks/reliability/elastic.py uses it, too.

All workers are on this machine. Horovod never uses a host again after a worker failed on it, so different names of this machine stand for
different hosts.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .launch import JOBS, environment

FIRST = {"localhost": 2, "127.0.0.1": 1}
AFTER = {"localhost": 2, "Localhost": 1}


class Line(NamedTuple):
    """One line of a process's log: BEGIN, STEP or END, and the words after it."""

    pid: int
    kind: str
    rank: int
    size: int
    rest: tuple[str, ...]


class Elastic:
    """Runs the job as a context manager. `log` returns the output of horovodrun."""

    def __init__(self, horovodrun: str, folder: Path, job: str, *arguments: str, limit: float = 240):
        self.folder, self.deadline = folder, time.monotonic() + limit
        discover = folder / "discover.sh"
        discover.write_text(f"#!/bin/sh\ncat '{folder}/hosts'\n")
        discover.chmod(0o755)
        self.hosts(FIRST)
        command = [horovodrun, "--gloo", "--disable-cache", "-np", "3", "--min-np", "2", "--max-np", "3", "--elastic-timeout", "120"]
        command += ["--host-discovery-script", str(discover), sys.executable, str(JOBS / job), str(folder), *arguments]
        self._out = (folder / "log").open("w")
        # Killing a worker can make Horovod lose an operation that it has just received, so our wait for it needs a timeout.
        limits = {**environment(), "GRACE_EXT_TIMEOUT": "30"}
        self.process = subprocess.Popen(command, env=limits, stdout=self._out, stderr=self._out, start_new_session=True)

    def __enter__(self) -> Elastic:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # horovodrun ends its workers
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        for line in self.lines():  # workers run in their own sessions, so some may have survived
            command = Path(f"/proc/{line.pid}/cmdline")
            if command.exists() and str(self.folder) in command.read_text():
                os.kill(line.pid, signal.SIGKILL)
        self._out.close()

    def hosts(self, slots: dict[str, int]) -> None:
        """Sets the hosts that the discovery script reports from now on."""
        fresh = self.folder / "hosts.new"
        fresh.write_text("".join(f"{host}:{count}\n" for host, count in slots.items()))
        fresh.rename(self.folder / "hosts")

    def lines(self) -> list[Line]:
        found = []
        for file in self.folder.glob("*.txt"):
            for text in file.read_text().splitlines(keepends=True):
                words = text.split()
                if text.endswith("\n") and len(words) > 3:
                    found.append(Line(int(file.stem), words[0], int(words[1]), int(words[2]), tuple(words[3:])))
        return found

    def steps(self, size: int) -> list[int]:
        """Returns the steps that were made with this many ranks."""
        return [int(line.rest[0]) for line in self.lines() if line.kind == "STEP" and line.size == size]

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Waits until the condition is true. Raises AssertionError if the job has ended or the time is over."""
        while not (found := condition()):
            ended = self.process.poll()
            if ended is not None or time.monotonic() > self.deadline:
                why = f"the job ended with {ended}" if ended is not None else "it took too long"
                raise AssertionError(f"waiting for {what}: {why}\n{self.log()}")
            time.sleep(0.2)
        return found

    def log(self) -> str:
        return (self.folder / "log").read_text()[-6000:]


def kill_and_grow(horovodrun: str, folder: Path, job: str, *arguments: str, limit: float = 240) -> dict[str, Any]:
    """Trains with three ranks, kills one, continues with two, and lets a third join. Returns what happened: world sizes in order, first and
    last losses, and digests of the final weights by rank."""
    with Elastic(horovodrun, folder, job, *arguments, limit=limit) as running:
        running.until("12 steps of three ranks", lambda: max(running.steps(3), default=0) >= 12)
        victim = next(line.pid for line in running.lines() if line.kind == "BEGIN" and line.rest[1] == "127.0.0.1")
        running.hosts({"localhost": 2})
        os.kill(victim, signal.SIGKILL)
        killed = max(running.steps(3))
        running.until("steps of the two that are left", lambda: max(running.steps(2), default=0) >= killed + 8)
        running.hosts(AFTER)
        alone = max(running.steps(2))
        running.until("steps of three ranks again", lambda: max(running.steps(3), default=0) >= max(alone, *running.steps(2)) + 12)
        (folder / "stop").touch()
        running.until("the end", lambda: len([line for line in running.lines() if line.kind == "END"]) == 3)
        running.process.wait(max(1.0, running.deadline - time.monotonic()))
        lines = running.lines()
    steps = sorted((line for line in lines if line.kind == "STEP"), key=lambda line: float(line.rest[2]))
    losses = [float(line.rest[1]) for line in steps]
    begun = {line.pid: int(line.rest[0]) for line in reversed(lines) if line.kind == "BEGIN"}  # the step at which each process joined
    return {
        "exit": running.process.returncode,
        "sizes": [size for size, _ in itertools.groupby(line.size for line in steps)],
        "joined": sum(step > 0 for step in begun.values()),
        "steps": int(steps[-1].rest[0]),
        "loss_first": sum(losses[:12]) / 12,
        "loss_last": sum(losses[-12:]) / 12,
        "weights": {line.rank: line.rest[0] for line in lines if line.kind == "END"},
        "log": running.log(),
    }
