"""Tests mixed precision in real jobs: each case of jobs/amp_*job.py is a test, and must hold on every rank."""

from __future__ import annotations

import pytest

from .test_jobs import cases_of, held


@pytest.mark.parametrize("case", cases_of("amp_job.py"))
@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_torch(engine, case):
    assert case in held(engine, 2, "amp_job.py")


@pytest.mark.parametrize("case", cases_of("amp_tf_job.py"))
def test_keras(case):
    assert case in held("horovodrun", 2, "amp_tf_job.py")
