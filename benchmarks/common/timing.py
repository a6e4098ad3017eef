"""Times one system's exchange on one rank, and measures its memory and its network interface. Independent of any framework."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FEWEST, MOST = 3, 15


class World(Protocol):
    """Connects the ranks of this job."""

    rank: int
    size: int

    def barrier(self) -> None: ...
    def largest(self, value: float) -> float:
        """Returns the maximum over the ranks."""


class System(Protocol):
    """Exchanges a set of gradients in one way."""

    #: Whether `baseline`, which does all that `exchange` does except the exchange itself, is timed in turn with it.
    has_baseline: bool
    #: Untimed steps at the start, which also fill the memory. If one step takes three budgets, only `least_warmups` are made.
    warmups: int
    least_warmups: int

    def fresh(self) -> None:
        """Makes new gradients; not timed."""

    def exchange(self) -> None:
        """Replaces every gradient by the mean, and returns when all are replaced."""

    def baseline(self) -> None: ...
    def settle(self) -> None:
        """Sets the memory to the state of long training. Called once after the first exchange; not timed."""

    def results(self) -> Iterable[np.ndarray]:
        """Returns the exchanged gradients."""

    def facts(self) -> dict[str, Any]:
        """Returns further entries of the report, such as `wire_bytes`."""


def run(world: World, system: System, *, before: int | None, budget: float, fewest: int = FEWEST) -> dict[str, Any]:
    """Measures the system on this rank. budget: seconds for all timed steps, generation included; at least one step is timed, and `fewest`
    if they take less than three times the budget. before: resident bytes, gradients included, before the system was made."""
    warmups, each = 0, 0.0
    while warmups < system.least_warmups or (warmups < system.warmups and each < 3 * budget):
        each = world.largest(timed(world, system)[1])
        if not warmups:
            system.settle()
        warmups += 1
    steps = max(1, min(MOST, int(budget / each)))
    if fewest * each < 3 * budget:
        steps = max(steps, fewest)
    forget_peak()
    times, baselines, sent = [], [], []
    for _ in range(steps):
        if system.has_baseline:
            baselines.append(timed(world, system, baseline=True)[0])
        already = transmitted()
        times.append(timed(world, system)[0])
        sent.append(None if already is None else transmitted() - already)
    summary = digest(system.results())
    peak = memory("VmHWM")
    return {
        "times": times, "baselines": baselines, "warmups": warmups, "sent": sent, **summary,
        "extra_memory": None if before is None or peak is None else peak - before, **system.facts(),
    }  # fmt: skip


def timed(world: World, system: System, baseline: bool = False) -> tuple[float, float]:
    """Returns the seconds of the exchange alone, and of the whole step, generation of the gradients included."""
    start = time.perf_counter()
    system.fresh()
    world.barrier()
    begin = time.perf_counter()
    (system.baseline if baseline else system.exchange)()
    end = time.perf_counter()
    return end - begin, end - start


def digest(results: Iterable[np.ndarray]) -> dict[str, Any]:
    """Summarizes the exchanged gradients: a hash, to compare the ranks; the fraction that is not zero; and whether all are finite."""
    hashed, count, nonzero, finite = hashlib.sha256(), 0, 0, True
    for array in results:
        hashed.update(np.ascontiguousarray(array).tobytes())
        count, nonzero = count + array.size, nonzero + int(np.count_nonzero(array))
        finite = finite and bool(np.isfinite(array).all())
    return {"digest": hashed.hexdigest()[:16], "nonzero": nonzero / count, "finite": finite}


def memory(what: str = "VmRSS") -> int | None:
    """Returns this process's resident bytes now, or with 'VmHWM' the peak since `forget_peak`; None if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what + ":")), None)


def trimmed() -> int | None:
    """Returns the resident bytes after free memory was returned to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    return memory()


def give_back_at_once() -> None:
    """Makes the C library return large arrays to the system as soon as they are freed. By default it keeps some, from nothing to 0.3 times
    the gradients, which would be measured as if it were in use."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD in bytes; unless set, it grows with the freed sizes


def forget_peak() -> None:
    """Resets VmHWM, the peak of the resident bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def transmitted() -> int | None:
    """Returns the bytes that this host's network interfaces have sent, TCP and Ethernet headers included; None if it has only loopback."""
    try:
        rows = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
    except OSError:
        return None
    sent = [int(numbers.split()[8]) for name, numbers in rows if name.strip() != "lo"]
    return sum(sent) if sent else None
