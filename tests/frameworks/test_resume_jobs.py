"""Real jobs stop and resume in new processes; benchmarks/reliability/resume.py runs all of resume_cases.CASES."""

from __future__ import annotations

import pytest

from .support import resume_cases
from .support.resume_cases import MPI, TENSORFLOW, TORCH, Case

#: A selection: every API once, and both an increase and a decrease of the number of ranks.
CASES = (
    Case("one rank more", "torchrun", TORCH, 2, (2, 3), ("wrapper:topk", "wrapper:ef21", "wrapper:shards", "ddp:topk", "local:topk")),
    Case("bits", "horovodrun", TORCH, 2, (2,), ("wrapper:policy", "wrapper:pipeline", "bind:topk", "local:topk")),
    Case("bits", "horovodrun", TENSORFLOW, 2, (2,), ("keras:powersgd", "checkpoint:topk", "tape:topk", "local:topk", "keras:bf16")),
    Case("one rank more", "horovodrun", TENSORFLOW, 2, (2, 3), ("bind:topk",)),
    Case("one rank fewer", "mpirun", MPI, 3, (3, 2), ("mpi:topk", "mpi:ef21", "mpi:shards", "mpi:pipeline", "mpi:bf16")),
    Case("a node fewer", "torchrun", TORCH, 4, (4, 2), ("wrapper:levels", "ddp:levels", "wrapper:nested", "wrapper:bf16")),
    Case("a node fewer", "horovodrun", TORCH, 4, (2,), ("wrapper:levels",)),
    Case("a node fewer", "horovodrun", TENSORFLOW, 4, (2,), ("keras:levels", "keras:nested")),
    Case("a node fewer", "mpirun", MPI, 4, (4, 2), ("mpi:levels", "mpi:nested")),
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_prefix(monkeypatch):
    # Importing the numpy package sets this variable; jobs must find Open MPI themselves.
    monkeypatch.delenv("OPAL_PREFIX", raising=False)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.engine}-{case.script[7:-7]}-{case.title}" for case in CASES])
def test_a_job_goes_on_in_new_processes(case, tmp_path):
    outcomes = resume_cases.outcomes(case, tmp_path)
    assert len(outcomes) == len(case.kinds) * len(case.then)
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "equal"} == {}
