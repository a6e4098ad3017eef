"""The environment variables by which a process knows what launched it, and of how many it is one."""

from __future__ import annotations

#: Set by horovodrun.
HOROVOD = ("HOROVOD_RANK", "HOROVOD_HOSTNAME")
#: Set by mpirun or srun.
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
