"""Loads compiled loops over host arrays, which do in one pass what takes array code several passes and temporaries.

Every kernel has a plain form, array code of arrays/numpy.py or of a part, and gives the same bits; the contract suite runs every part with
both. GRACE_EXT_KERNELS=0 turns kernels off; they are also off if numba is not installed.

They are compiled once and kept in a folder of the user's cache (GRACE_EXT_CACHE names another one). Its name contains a digest of this
folder's files and of numba's bounds checking, because numba's own cache notices neither an edited helper nor that setting.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

from .cache import cache_folder as cache_folder
from .cache import enabled as enabled
from .cache import kernels_folder


@lru_cache(maxsize=1)
def load() -> SimpleNamespace:
    """Returns every kernel, by name. The first process on a machine compiles them, with a notice; others started meanwhile wait."""
    compiled = kernels_folder() / "compiled"
    if not compiled.exists():
        with _one_at_a_time():
            if not compiled.exists():
                _compile()
                compiled.touch()
    from .compile import Kernel

    every = [item for part in parts() for module in compiled_part(part) for item in vars(module).items()]
    return SimpleNamespace(**{"narrow": None, **{name: value for name, value in every if isinstance(value, Kernel)}})


def parts() -> tuple[Sequence[str], Sequence[str]]:
    """Returns the names of the modules of kernels, in two parts that take about equally long to compile."""
    from .compile import converts_halves

    return ("bits", "elementwise", "select", "merged"), ("codes", "random", "levels", "lowrank", *(["half"] if converts_halves() else []))


def compiled_part(names: Sequence[str]) -> list[ModuleType]:
    """Imports these modules, which compiles their kernels, or loads those that were compiled before."""
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def _compile() -> None:
    """Compiles all kernels, half of them in a second process if there is a processor for it."""
    print("grace_ext: compiling kernels, once on this machine (up to 20 s) ...", file=sys.stderr, flush=True)
    start, helper = time.perf_counter(), None
    if (os.cpu_count() or 1) > 1 and kernels_folder().is_relative_to(cache_folder()):
        script = f"from {__name__} import compiled_part, parts; compiled_part(parts()[1])"
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with suppress(OSError):
            helper = subprocess.Popen([sys.executable, "-c", script], **quiet)  # what it does not finish, this process does
    compiled_part(parts()[0])
    if helper:
        helper.wait()
    compiled_part(parts()[1])
    print(f"grace_ext: compiled in {time.perf_counter() - start:.0f} s, kept in {kernels_folder()}", file=sys.stderr, flush=True)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Lets one of this machine's processes run the block at a time; or all at once, if files cannot be locked."""
    with (kernels_folder() / "lock").open("w") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
