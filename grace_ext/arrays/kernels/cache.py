"""Says whether kernels are enabled, and where compiled ones are kept."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path


def enabled() -> bool:
    """Whether compiled kernels are used for host arrays."""
    return os.environ.get("GRACE_EXT_KERNELS", "1") != "0" and _has_numba()


@lru_cache(maxsize=1)
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def cache_folder() -> Path:
    """Returns the folder for everything that is kept between runs."""
    chosen = os.environ.get("GRACE_EXT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "grace_ext")


@lru_cache(maxsize=1)
def kernels_folder() -> Path:
    """Returns the folder of compiled kernels: in the user's cache, or a temporary one if that cannot be written."""
    digest = hashlib.sha256(os.environ.get("NUMBA_BOUNDSCHECK", "").encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    try:
        path = Path(cache_folder(), "kernels", digest.hexdigest()[:16])
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="grace_ext-kernels-"))
