"""Tests what ranks may and may not do differently: each case of jobs/agreement_job.py is a test, and must hold on every rank."""

from __future__ import annotations

import pytest

from .test_jobs import cases_of, held


@pytest.mark.parametrize("case", cases_of("agreement_job.py"))
@pytest.mark.parametrize(("engine", "ranks"), [("torchrun", 3), ("horovodrun", 2)])
def test_ranks_may_differ_or_are_told(engine, ranks, case):
    assert case in held(engine, ranks, "agreement_job.py")
