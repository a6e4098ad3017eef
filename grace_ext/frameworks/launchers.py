"""The environment variables that show which launcher started this process, and that it is one rank of a job."""

from __future__ import annotations

#: Set by horovodrun.
HOROVOD = ("HOROVOD_RANK", "HOROVOD_HOSTNAME")
#: Set by mpirun or srun.
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
