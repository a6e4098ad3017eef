"""Tests that ranks which a launcher started, but which do not find each other, are told so: each would train alone."""

from __future__ import annotations

import warnings

import pytest

from grace_ext.errors import UnsupportedError
from grace_ext.frameworks import launchers

from .support.launch import job


@pytest.fixture(autouse=True)
def _each_test_is_warned():
    launchers._warn_once.cache_clear()
    yield
    launchers._warn_once.cache_clear()


@pytest.mark.parametrize("engine", ["numpy", "numpy-local", "tensorflow", "tensorflow-local"])
def test_torchrun_does_not_connect_them(engine):
    said = job("torchrun", 2, "alone_engine_job.py", engine)
    assert said.count("TOLD torchrun started") == 2, said
    assert ("horovodrun" if engine.startswith("tensorflow") else "mpirun -np N") in said, said


@pytest.mark.parametrize(
    ("engine", "environment", "expected"),
    [
        ("MPI", {"WORLD_SIZE": "4"}, "torchrun does not start MPI's ranks"),
        ("MPI", {"HOROVOD_SIZE": "2"}, "horovodrun does not start MPI's ranks"),
        ("Horovod", {"WORLD_SIZE": "2"}, "torchrun does not start Horovod's ranks"),
        ("torch.distributed", {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun does not start torch.distributed's ranks"),
        ("torch.distributed", {"PMI_SIZE": "2"}, "mpirun does not start torch.distributed's ranks"),
    ],
)
def test_a_launcher_that_does_not_serve_the_engine(engine, environment, expected):
    with pytest.raises(UnsupportedError, match=expected):
        launchers.check_alone(engine, "Start it otherwise", environment)


@pytest.mark.parametrize(
    ("engine", "environment"),
    [
        ("MPI", {"PMI_SIZE": "2"}),
        ("MPI", {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}),
        ("Horovod", {"HOROVOD_SIZE": "2"}),
        ("Horovod", {"OMPI_COMM_WORLD_SIZE": "8"}),
        ("torch.distributed", {"WORLD_SIZE": "2"}),
    ],
)
def test_a_launcher_that_serves_the_engine_is_warned_of_once(engine, environment):
    with pytest.warns(UserWarning, match=f"{engine} has one here, so each rank would train alone"):
        launchers.check_alone(engine, "Start it otherwise", environment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launchers.check_alone(engine, "Start it otherwise", environment)


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "8"}, {"HOROVOD_SIZE": "2", "HOROVOD_ELASTIC": "1"}, {"WORLD_SIZE": ""}]
)
def test_one_rank_is_one_rank(environment):
    """No launcher, an allocation in which srun has not started this process, and an elastic job that may have shrunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launchers.check_alone("Horovod", "", environment)
