"""Compiled loops over host arrays: what array code takes several passes and temporaries for, in one pass.

Every kernel has a plain form, an operation of frameworks/numpy/ops.py, and gives the same bits; the contract suite runs every part
with both. GRACE_EXT_KERNELS=0 turns kernels off, and they are off where numba is not installed.

They are compiled once and kept in a folder of the user's cache (GRACE_EXT_CACHE names another one), whose name carries a digest of this
folder's files and of numba's bounds checking, because numba sees neither an edited helper nor that setting in what it has cached.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

#: The bits of an infinite float32: those of finite magnitudes are below.
INFINITY = 0x7F800000
#: Elements that stay in the first-level cache while kernels look at them again.
PIECE = 2048


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
    """Every kernel, by name. The first time on a machine this compiles them, and says so."""
    compiled = folder() / "compiled"
    known = compiled.exists()
    if not known:
        print("grace_ext: compiling kernels, once on this machine (up to 20 s) ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    from . import bits, codes, elementwise, levels, lowrank, random, select
    from .compile import Kernel, converts_halves

    modules = [bits, codes, elementwise, levels, lowrank, random, select]
    if converts_halves():
        from . import half

        modules.append(half)

    if not known:
        compiled.touch()
        print(f"grace_ext: compiled in {time.perf_counter() - start:.0f} s, kept in {folder()}", file=sys.stderr, flush=True)
    every = [item for module in modules for item in vars(module).items()]
    return SimpleNamespace(**{"narrow": None, **{name: value for name, value in every if isinstance(value, Kernel)}})
