"""What ranks may do differently, and what they may not: each case of jobs/agreement_job.py is a test here, and held on every rank."""

from __future__ import annotations

import pytest

from .test_jobs import cases_of, held


@pytest.mark.parametrize("case", cases_of("agreement_job.py"))
@pytest.mark.parametrize(("engine", "ranks"), [("torchrun", 3), ("horovodrun", 2)])
def test_ranks_may_differ_or_are_told(engine, ranks, case):
    assert case in held(engine, ranks, "agreement_job.py")
