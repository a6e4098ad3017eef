"""The environment variables that show which launcher started this process, and that it is one rank of a job."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from ..errors import UnsupportedError, warn_user

#: Set by horovodrun.
HOROVOD = ("HOROVOD_RANK", "HOROVOD_HOSTNAME")
#: Set by mpirun or srun.
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
#: Where launchers say how many ranks they started: the launcher, and the engines whose ranks can find each other under it.
SIZES = {
    "HOROVOD_SIZE": ("horovodrun", ("Horovod",)),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", ("Horovod", "MPI")),
    "PMI_SIZE": ("mpirun", ("Horovod", "MPI")),
    "WORLD_SIZE": ("torchrun", ("torch.distributed",)),
    "SLURM_NTASKS": ("srun", ("Horovod", "MPI", "torch.distributed")),
}


def check_alone(engine: str, way_out: str, environ: Mapping[str, str] = os.environ) -> None:
    """Checks that no launcher started several ranks, where an engine ('Horovod', 'MPI' or 'torch.distributed') says that this process is
    its only rank: each rank would train alone. Raises UnsupportedError if the launcher does not serve the engine, and warns if it does.

    way_out: what to do instead."""
    for name, (launcher, serves) in SIZES.items():
        size = environ.get(name, "1")
        if name == "SLURM_NTASKS" and "SLURM_STEP_ID" not in environ:
            continue  # the size of an allocation, in which no srun has started this process
        if name == "HOROVOD_SIZE" and environ.get("HOROVOD_ELASTIC") == "1":
            continue  # the size at the start of an elastic job, which may have shrunk to one rank
        if not size.isdigit() or int(size) <= 1:
            continue
        end = f"{way_out}, or unset {name} if each rank shall train alone"
        seen = f"{launcher} started {size} ranks ({name}={size}), but {engine} has one here, so each rank would train alone"
        if engine not in serves:
            raise UnsupportedError(f"{seen}: {launcher} does not start {engine}'s ranks. {end}")
        _warn_once(f"{seen}: is {engine} built for this launcher, and initialized? {end}")


@functools.cache
def _warn_once(sentence: str) -> None:
    warn_user(sentence)
