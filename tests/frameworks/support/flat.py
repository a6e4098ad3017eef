"""Makes and drops 50 of a wrapper, as a search over models does, and asserts that this process ends flat."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

#: The first wrappers fill caches and pools of threads. Those after them count.
WARM, TURNS = 10, 50
#: Bytes of each model. Those of all wrappers that count would be 40 MiB, without their memories.
MODEL = 1 << 20
#: What this process may grow by while they come and go: a fifth of a model for each. Keras itself keeps a tenth for each of its optimizers,
#: and torch 10 KB for each process group.
GROWTH = (TURNS - WARM) * MODEL // 5


def seen() -> dict[str, int]:
    """Returns what this process has: resident bytes, threads and open files."""
    ctypes.CDLL(None).malloc_trim(0)  # or what is free but not given back counts, which differs from run to run
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"bytes": resident, "threads": len(os.listdir("/proc/self/task")), "files": len(os.listdir("/proc/self/fd"))}


def assert_flat(use: Callable[[], Any]) -> None:
    """Calls `use` 50 times, and asserts that the objects to which it returned weak references are gone (but perhaps the last one), and that
    neither memory nor threads nor files have grown."""
    left: list[Any] = []
    before: dict[str, int] = {}
    for turn in range(TURNS):
        left = [*(each for each in left if each() is not None), use()]
        gc.collect()
        if turn == 0:
            gc.freeze()  # what is there so far, such as all imported modules, which would be searched 50 times
        if turn + 1 == WARM:
            before = seen()
    gc.unfreeze()
    after, living = seen(), sum(each() is not None for each in left)
    assert living <= 1, f"{living} of {TURNS} are still there"
    grown = {what: after[what] - before[what] for what in after}
    assert grown["bytes"] < GROWTH and grown["threads"] <= 3 and grown["files"] <= 6, grown
