"""Runs the ranks of a job in threads of this process, with torch's own `threaded` process groups. They take tensors of a pretended device,
too, which Gloo and NCCL cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup, _install_threaded_pg, _uninstall_threaded_pg

#: Seconds that all ranks together may take.
PATIENCE = 60.0


def on_threads(size: int, program: Callable[[int], Any]) -> list[Any]:
    """Calls the program with each rank, at the same time, in a job of so many ranks. Returns what it returned or raised, by rank."""
    outcomes: list[Any] = [None] * size
    isolate = getattr(torch._C._distributed_c10d, "_set_thread_isolation_mode", lambda on: None)  # newer torch needs it

    def rank(number: int) -> None:
        dist.init_process_group("threaded", rank=number, world_size=size, store=store)
        try:
            outcomes[number] = program(number)
        except BaseException as error:
            outcomes[number] = error
            ProcessLocalGroup.exception_handle(error)  # ends the others, with SystemExit
        finally:
            dist.destroy_process_group()

    isolate(True)
    _install_threaded_pg()
    store = dist.HashStore()
    ProcessLocalGroup.reset()
    try:
        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        hang = [number for number, thread in enumerate(threads) if thread.is_alive()]
        if hang:
            ProcessLocalGroup.exception_handle(None)
            for thread in threads:
                thread.join(1.0)
            raise AssertionError(f"ranks {hang} of {size} did not end within {PATIENCE:g} s; the others: {outcomes}")
    finally:
        _uninstall_threaded_pg()
        isolate(False)
    return outcomes
