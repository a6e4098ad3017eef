"""Tests `fsdp_hook` in real jobs of 2 replicas x 2 shards: each case of jobs/fsdp_*job.py is a test, and must hold on every rank."""

from __future__ import annotations

import pytest

from .support import training
from .test_jobs import cases_of, held


@pytest.mark.parametrize("number", range(len(training.SHARDED_SPECS)), ids=training.SHARDED_SPECS)
def test_equals_local_clusters(number):
    assert f"case_spec_{number}" in held("torchrun", 4, "fsdp_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_use_job.py"))
def test_use(case):
    assert case in held("torchrun", 4, "fsdp_use_job.py")


@pytest.mark.parametrize("case", cases_of("fsdp_refused_job.py"))
def test_state_and_refused_uses(case):
    assert case in held("torchrun", 4, "fsdp_refused_job.py")
