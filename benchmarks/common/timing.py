"""Times one system's exchange on one rank, and watches its memory and its network interface. No framework in here."""

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
    """The ranks of this job."""

    rank: int
    size: int

    def barrier(self) -> None: ...
    def largest(self, value: float) -> float:
        """The maximum over the ranks."""


class System(Protocol):
    """One way to exchange a set of gradients."""

    #: Whether `baseline` is timed, in turn with the exchange: all that `exchange` does but the exchange.
    has_baseline: bool
    #: Steps before those that count: a memory should have something to add. Where a step takes three budgets only the least are done.
    warmups: int
    least_warmups: int

    def fresh(self) -> None:
        """New gradients; not timed."""

    def exchange(self) -> None:
        """Until the mean is in place of every gradient."""

    def baseline(self) -> None: ...
    def settle(self) -> None:
        """Called once after the first exchange, not timed: brings a memory to where long training would."""

    def results(self) -> Iterable[np.ndarray]:
        """The exchanged gradients."""

    def facts(self) -> dict[str, Any]:
        """More to report, such as `wire_bytes`."""


def run(world: World, system: System, *, before: int | None, budget: float, fewest: int = FEWEST) -> dict[str, Any]:
    """What this rank saw. budget: seconds for all timed steps, generation included; at least one step is timed, and `fewest` where
    they take less than three times the budget. before: this process's resident bytes, gradients included, before the system was made."""
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
    """Seconds of the exchange alone, and of the whole step with making the gradients."""
    start = time.perf_counter()
    system.fresh()
    world.barrier()
    begin = time.perf_counter()
    (system.baseline if baseline else system.exchange)()
    end = time.perf_counter()
    return end - begin, end - start


def digest(results: Iterable[np.ndarray]) -> dict[str, Any]:
    """Of the exchanged gradients: a hash, to see that all ranks have the same, the fraction not zero, and whether all are finite."""
    hashed, count, nonzero, finite = hashlib.sha256(), 0, 0, True
    for array in results:
        hashed.update(np.ascontiguousarray(array).tobytes())
        count, nonzero = count + array.size, nonzero + int(np.count_nonzero(array))
        finite = finite and bool(np.isfinite(array).all())
    return {"digest": hashed.hexdigest()[:16], "nonzero": nonzero / count, "finite": finite}


def memory(what: str = "VmRSS") -> int | None:
    """This process's resident bytes now, or 'VmHWM', the most since `forget_peak`; None where Linux does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what + ":")), None)


def trimmed() -> int | None:
    """Resident bytes after giving back what is free."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    return memory()


def give_back_at_once() -> None:
    """Large arrays are given back to the system as they are freed. The C library keeps some, 0.3 times the gradients one time and nothing
    another, which would be measured in place of what is held."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD, in bytes, which otherwise grows with what is freed


def forget_peak() -> None:
    """Starts VmHWM anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def transmitted() -> int | None:
    """Bytes that this host's network interfaces have sent so far, headers of TCP and Ethernet included; None without any but loopback."""
    try:
        rows = [line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line]
    except OSError:
        return None
    sent = [int(numbers.split()[8]) for name, numbers in rows if name.strip() != "lo"]
    return sum(sent) if sent else None
