"""Tests LocalSGD in real jobs: each case of jobs/local_*_job.py is a test; and which error ranks get if another rank leaves."""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache

import pytest

from .support.launch import job
from .test_jobs import cases_of, held


@pytest.mark.parametrize("case", cases_of("local_job.py"))
@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_torch(engine, case):
    assert case in held(engine, 2, "local_job.py")


@pytest.mark.parametrize("case", cases_of("local_tf_job.py"))
def test_keras(case):
    pytest.importorskip("tensorflow")
    assert case in held("horovodrun", 2, "local_tf_job.py")


@pytest.mark.parametrize("case", cases_of("local_mpi_job.py"))
def test_mpi(case, monkeypatch):
    monkeypatch.delenv("OPAL_PREFIX", raising=False)  # set by importing the numpy package here; jobs find Open MPI themselves
    assert case in held("mpirun", 3, "local_mpi_job.py")


@lru_cache
def said(engine: str, framework: str, mode: str, leaver: int) -> list[tuple[int, float, str]]:
    """Runs the job. Returns (rank, seconds, error) for each rank that stayed."""
    out = job(engine, 2, "local_leave_job.py", framework, mode, str(leaver))
    return [(int(rank), float(seconds), error) for rank, seconds, error in re.findall(r"TOLD (\d) (\S+) (.*)", out)]


JOBS = [
    ("torchrun", "torch", "synchronous", 1),
    ("torchrun", "torch", "asynchronous", 1),
    ("torchrun", "torch", "synchronous", 0),
    ("horovodrun", "torch", "synchronous", 1),
    ("horovodrun", "tensorflow", "synchronous", 1),
    ("horovodrun", "tensorflow", "asynchronous", 1),
]


@pytest.mark.parametrize(("engine", "framework", "mode", "leaver"), JOBS)
def test_a_rank_that_leaves_is_told_and_nobody_hangs(engine, framework, mode, leaver):
    """The remaining rank gets a RankLeftError well before the timeout of 60 s."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: pip install 'grace_ext[{framework}]'")
    ((rank, seconds, error),) = said(engine, framework, mode, leaver)
    assert rank == 1 - leaver and seconds < 30
    assert "RankLeftError" in error and (f"rank {leaver} left" in error or "rank 0, where ranks meet, has left" in error), error
