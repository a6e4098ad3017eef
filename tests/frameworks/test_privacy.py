"""Tests privacy in real jobs: each case of jobs/privacy_*job.py is a test, and must hold on every rank."""

from __future__ import annotations

import pytest

from .test_jobs import cases_of, held


@pytest.mark.parametrize("case", cases_of("privacy_job.py"))
@pytest.mark.parametrize(("engine", "ranks"), [("torchrun", 2), ("horovodrun", 2), ("python", 1)])
def test_wrapper(engine, ranks, case):
    assert case in held(engine, ranks, "privacy_job.py")
