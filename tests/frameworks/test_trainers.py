"""Tests grace_ext.integrations in real jobs: each case of the trainers' jobs is a test, and must hold on every rank."""

from __future__ import annotations

import pytest

from .support.launch import job
from .test_jobs import cases_of, held


@pytest.mark.parametrize("case", cases_of("transformers_job.py"))
def test_transformers(case):
    assert case in held("torchrun", 2, "transformers_job.py")


@pytest.mark.parametrize("case", cases_of("accelerate_job.py"))
def test_accelerate(case):
    assert case in held("torchrun", 2, "accelerate_job.py")


@pytest.mark.parametrize("case", cases_of("lightning_job.py"))
def test_lightning(case):
    assert case in held("torchrun", 2, "lightning_job.py")


@pytest.mark.parametrize("name", ["transformers_job.py", "accelerate_job.py"])
def test_alone(name):
    assert "ALONE ok" in job("python", 1, name)


def test_ray():
    assert "RAY ok" in job("python", 1, "ray_job.py", timeout=600)
