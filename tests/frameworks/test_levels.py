"""`hierarchical` on real engines (cases: jobs/levels_job.py) gives the results of a LocalCluster with the same even or uneven nodes."""

from __future__ import annotations

import pytest

from .support.launch import job
from .test_jobs import cases_of, held_in

ENGINES = {"torch.distributed": ("torchrun", "wrapper"), "Horovod": ("horovodrun", "wrapper"), "MPI": ("mpirun", "mpi")}


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (3, 2)], ids=["even", "uneven"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_levels(engine, ranks, per_node):
    launcher, mode = ENGINES[engine]
    said = job(launcher, ranks, "levels_job.py", mode, str(per_node))
    assert held_in(said) == set(cases_of("levels_job.py"))


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (3, 2)], ids=["even", "uneven"])
def test_two_levels_in_tensorflow(ranks, per_node):
    said = job("horovodrun", ranks, "levels_tf_job.py", str(per_node))
    assert held_in(said) == set(cases_of("levels_tf_job.py"))
