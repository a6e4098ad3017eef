"""Loads compiled loops over host arrays, which do in one pass what takes array code several passes and temporaries.

Every kernel has a plain form, array code of arrays/numpy.py or of a part, and gives the same bits; the contract suite runs every part with
both. GRACE_EXT_KERNELS=0 turns kernels off; they are also off if numba is not installed, or if NUMBA_DISABLE_JIT=1.

They are compiled once and kept in a folder of the user's cache (GRACE_EXT_CACHE names another one). Its name contains a digest of this
folder's files, the versions of numba and numpy, the processor, and numba's bounds checking. A folder in which all are kept is only read. If
they are not all there, and cannot be kept, plain operations are used: otherwise every process would compile them each time it starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ...errors import GraceError, warn_user
from .cache import cache_folder as cache_folder
from .cache import complete, kernels_folder
from .cache import enabled as enabled


@lru_cache(maxsize=1)
def load() -> SimpleNamespace | None:
    """Returns every kernel, by name. The first process on a machine compiles them, with a notice; others started meanwhile wait. Warns and
    returns None if there can be none."""
    try:
        return _loaded()
    except Exception as error:  # numba, LLVM and the file system have no error in common
        # On every rank: other hosts have other disks, and the slowest rank sets the pace of all.
        warn_user(f"{_reason(error)}, so plain operations are used, which are slower. {_WAY_OUT}", every_rank=True)
        return None


_WAY_OUT = (
    "Let GRACE_EXT_CACHE name a folder that can be written, or one that `grace-ext compile --into FOLDER` filled on such a machine; "
    "GRACE_EXT_KERNELS=0 chooses plain operations without this warning"
)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"compiled kernels are not kept in {kernels_folder()} yet, and cannot be written there ({error.strerror or error})"
    return f"kernels cannot be compiled ({type(error).__name__}: {error})"


def _loaded(tell: Callable[[str], None] = lambda module: None) -> SimpleNamespace:
    """Returns every kernel, by name. Compiles those that are not kept. `tell` gets the names of their modules, one by one."""
    if not complete().exists():
        kernels_folder().mkdir(parents=True, exist_ok=True)
        with _one_at_a_time():
            if not complete().exists():
                _compile(tell)
                complete().touch()
    from .compile import Kernel

    every = [item for part in parts() for module in compiled_part(part, tell) for item in vars(module).items()]
    return SimpleNamespace(**{"narrow": None, **{name: value for name, value in every if isinstance(value, Kernel)}})


def prebuild(folder: Path, tell: Callable[[int, int], None]) -> Path:
    """Compiles all kernels into this folder, which GRACE_EXT_CACHE is to name later; those in it are not compiled again. Returns the folder
    inside of it. `tell` is called with (how many of the kernels' modules are done, how many there are). Raises GraceError if kernels
    cannot be compiled or written."""
    if not enabled():
        raise GraceError("there is nothing to compile: numba is missing, or GRACE_EXT_KERNELS=0 or NUMBA_DISABLE_JIT=1 turns kernels off")
    os.environ["GRACE_EXT_CACHE"] = str(folder.absolute())  # for this process, and for the one that helps it
    kernels_folder.cache_clear()
    done: set[str] = set()

    def finished(module: str) -> None:
        done.add(module)
        tell(len(done), sum(map(len, parts())))

    try:
        _loaded(finished)
    except Exception as error:
        raise GraceError(f"{_reason(error)}; kernels need 10 MB in a folder that can be written") from error
    return kernels_folder()


def parts() -> tuple[Sequence[str], Sequence[str]]:
    """Returns the names of the modules of kernels, in two parts that take about equally long to compile."""
    from .compile import converts_halves

    return ("bits", "elementwise", "select", "merged"), ("codes", "random", "levels", "lowrank", *(["half"] if converts_halves() else []))


def compiled_part(names: Sequence[str], tell: Callable[[str], None] = lambda module: None) -> list[ModuleType]:
    """Imports these modules, which compiles their kernels, or loads those that were compiled before."""
    found = []
    for name in names:
        found.append(importlib.import_module(f"{__name__}.{name}"))
        tell(name)
    return found


def _compile(tell: Callable[[str], None]) -> None:
    """Compiles all kernels, half of them in a second process if there is a processor for it."""
    print("grace_ext: compiling kernels, once on this machine (up to 20 s) ...", file=sys.stderr, flush=True)
    start, helper = time.perf_counter(), None
    if (os.cpu_count() or 1) > 1:
        script = f"from {__name__} import compiled_part, parts; compiled_part(parts()[1])"
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with suppress(OSError):
            helper = subprocess.Popen([sys.executable, "-c", script], **quiet)  # what it does not finish, this process does
    try:
        compiled_part(parts()[0], tell)
    finally:
        if helper:
            helper.wait()
    compiled_part(parts()[1], tell)
    print(f"grace_ext: compiled in {time.perf_counter() - start:.0f} s, kept in {kernels_folder()}", file=sys.stderr, flush=True)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Lets one of this machine's processes run the block at a time; or all at once, if files cannot be locked."""
    with (kernels_folder() / "lock").open("w") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
