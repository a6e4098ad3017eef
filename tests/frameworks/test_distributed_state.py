"""`DistributedState` in torch.distributed.checkpoint: real jobs save and load, in one process (cases) and in new ones."""

from __future__ import annotations

import pytest

from .support import resume_cases
from .support.resume_cases import Case
from .test_jobs import cases_of, held

KINDS = tuple(f"checkpoint-{kind}" for kind in resume_cases.kinds("wrapper", "ddp", "local"))


@pytest.mark.parametrize("case", cases_of("dcp_job.py"))
def test_in_one_job(case):
    assert case in held("torchrun", 3, "dcp_job.py")


@pytest.mark.parametrize("case", cases_of("dcp_alone_job.py"))
def test_alone(case):
    assert case in held("python", 1, "dcp_alone_job.py")


def test_four_ranks_save_and_four_or_two_load(tmp_path):
    case = Case("torch.distributed.checkpoint", "torchrun", "resume_dcp_job.py", 4, (4, 2), KINDS)
    outcomes = resume_cases.outcomes(case, tmp_path)
    assert len(outcomes) == 2 * len(KINDS)
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "equal"} == {}
