"""Compiled loops over host arrays: what array code takes several passes and temporaries for, in one pass.

Every kernel has a plain form, an operation of frameworks/numpy/ops.py, and gives the same bits; the contract suite runs every part
with both. GRACE_EXT_KERNELS=0 turns kernels off, and they are off where numba is not installed.

They are compiled once and kept in a folder of the user's cache (GRACE_EXT_CACHE names another one), whose name carries a digest of this
folder's files and of numba's bounds checking, because numba sees neither an edited helper nor that setting in what it has cached.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

#: The bits of an infinite float32: those of finite magnitudes are below.
INFINITY = 0x7F800000
#: Elements that stay in the first-level cache while kernels look at them again.
PIECE = 2048
#: And in the second-level cache, a few times as many.
STRETCH = 16384


def enabled() -> bool:
    """Whether host arrays are worked on by compiled kernels."""
    return os.environ.get("GRACE_EXT_KERNELS", "1") != "0" and _has_numba()


@lru_cache(maxsize=1)
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def cache() -> Path:
    """What is kept between runs is kept here."""
    chosen = os.environ.get("GRACE_EXT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "grace_ext")


@lru_cache(maxsize=1)
def folder() -> Path:
    """Where compiled kernels are kept: in the user's cache, or in a temporary folder where that cannot be written."""
    digest = hashlib.sha256(os.environ.get("NUMBA_BOUNDSCHECK", "").encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    try:
        path = Path(cache(), "kernels", digest.hexdigest()[:16])
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="grace_ext-kernels-"))


@lru_cache(maxsize=1)
def load() -> SimpleNamespace:
    """Every kernel, by name. The first process on a machine compiles them, and says so; others that start meanwhile wait for it."""
    compiled = folder() / "compiled"
    if not compiled.exists():
        with _one_at_a_time():
            if not compiled.exists():
                _compile()
                compiled.touch()
    from .compile import Kernel

    every = [item for part in parts() for module in compiled_part(part) for item in vars(module).items()]
    return SimpleNamespace(**{"narrow": None, **{name: value for name, value in every if isinstance(value, Kernel)}})


def parts() -> tuple[Sequence[str], Sequence[str]]:
    """Names of the modules of kernels, in two parts that take about as long to compile."""
    from .compile import converts_halves

    return ("bits", "elementwise", "select", "joined"), ("codes", "random", "levels", "lowrank", *(["half"] if converts_halves() else []))


def compiled_part(names: Sequence[str]) -> list[ModuleType]:
    """Imports these modules: kernels are compiled, or loaded where they were before."""
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def _compile() -> None:
    """All kernels, half of them by a second process, if there is a processor for it."""
    print("grace_ext: compiling kernels, once on this machine (up to 20 s) ...", file=sys.stderr, flush=True)
    start, helper = time.perf_counter(), None
    if (os.cpu_count() or 1) > 1 and folder().is_relative_to(cache()):
        script = f"from {__name__} import compiled_part, parts; compiled_part(parts()[1])"
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with suppress(OSError):
            helper = subprocess.Popen([sys.executable, "-c", script], **quiet)  # what it does not get done, we do
    compiled_part(parts()[0])
    if helper:
        helper.wait()
    compiled_part(parts()[1])
    print(f"grace_ext: compiled in {time.perf_counter() - start:.0f} s, kept in {folder()}", file=sys.stderr, flush=True)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Among this machine's processes; all at once where files cannot be locked."""
    with (folder() / "lock").open("w") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
