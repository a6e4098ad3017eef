"""The transport of every engine keeps the contract that docs/extending offers to others, among two and three real processes."""

from __future__ import annotations

import pytest

from grace_ext.testing.transport_checks import CHECKS

from .support.launch import job
from .test_jobs import held_in

ENGINES = {
    "torch.distributed": ("torchrun", "torch"), "Horovod": ("horovodrun", "torch"), "Horovod, TensorFlow": ("horovodrun", "tensorflow"),
    "MPI": ("mpirun", "mpi"),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_keeps_the_contract(engine, ranks):
    launcher, mode = ENGINES[engine]
    assert held_in(job(launcher, ranks, "transport_job.py", mode)) == {f"case_{check.__name__}" for check in CHECKS}
