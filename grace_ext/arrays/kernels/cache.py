"""Says whether kernels are enabled, and keeps compiled ones in files.

Each kernel is a file of its own, which begins with the digest of the rest: a file that is damaged is compiled again, instead of ending the
process. (numba's own cache fails on such files, needs a folder that it can write to, and depends on the path of the sources.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

#: The bytes of the digest at the beginning of a file.
DIGEST = 32


def enabled() -> bool:
    """Whether compiled kernels are used for host arrays, unless they cannot be loaded (see `load`)."""
    return os.environ.get("GRACE_EXT_KERNELS", "1") != "0" and _compiles()


@lru_cache(maxsize=1)
def _compiles() -> bool:
    """Whether there is a numba, and its user lets it compile (NUMBA_DISABLE_JIT)."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        from numba import config
    except Exception:  # it does not fit numpy, or is damaged: `load` says so
        return True
    return not getattr(config, "DISABLE_JIT", 0)  # numba sets it when it is loaded


def cache_folder() -> Path:
    """Returns the folder for everything that is kept between runs."""
    chosen = os.environ.get("GRACE_EXT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "grace_ext")


@lru_cache(maxsize=1)
def kernels_folder() -> Path:
    """Returns the folder of the kernels that these sources and libraries give for this processor. It may not exist yet."""
    digest = hashlib.sha256(repr(_compiled_for()).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return Path(cache_folder(), "kernels", digest.hexdigest()[:16])


def _compiled_for() -> tuple[str, ...]:
    """Returns what machine code depends on, besides its source."""
    import platform

    import llvmlite
    import numba
    import numpy as np

    versions = platform.python_version(), numba.__version__, llvmlite.__version__, np.__version__
    return (*versions, *target(), os.environ.get("NUMBA_BOUNDSCHECK", ""))


def target() -> tuple[str, str, str]:
    """Returns (platform, processor, its features), for which numba compiles: those of this machine, unless NUMBA_CPU_NAME,
    NUMBA_CPU_FEATURES or NUMBA_ENABLE_AVX say otherwise."""
    from numba.core.registry import cpu_target

    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    return str(triple), str(processor), str(features)


def complete() -> Path:
    """Returns the file that says, by being there, that all kernels were kept."""
    return kernels_folder() / "complete"


def kept(name: str) -> bytes | None:
    """Returns what was kept under this name. None if that is nothing, or damaged."""
    with suppress(OSError):
        data = (kernels_folder() / name).read_bytes()
        if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]:
            return data[DIGEST:]
    return None


def keep(name: str, data: bytes) -> None:
    """Keeps data under a name, all or nothing. Raises OSError if it cannot, unless all kernels were kept and this one was damaged."""
    try:
        _write(kernels_folder() / name, hashlib.sha256(data).digest() + data)
    except OSError:
        if not complete().exists():
            raise


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
