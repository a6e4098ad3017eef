"""Tests the wrapper and the adapter in real jobs: each case of these jobs/*_job.py is a test, and must hold on every rank."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

from .support.launch import JOBS, job


def cases_of(file: str) -> list[str]:
    return re.findall(r"^def (case_\w+)", (JOBS / file).read_text(), re.MULTILINE)


class Held(frozenset):
    """The cases that a job reported as ok. If one is missing, pytest shows the job's output."""

    said = ""

    def __repr__(self) -> str:
        return f"{sorted(self)}:\n{self.said[-8000:]}"


def held_in(said: str) -> Held:
    """Returns the cases that held, according to a job's output."""
    cases = Held(re.findall(r"CASE (case_\w+) ok", said))
    cases.said = said
    return cases


@lru_cache
def held(engine: str, ranks: int, file: str) -> Held:
    return held_in(job(engine, ranks, file))


@pytest.mark.parametrize("case", cases_of("wrapper_job.py"))
@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_wrapper(engine, case):
    assert case in held(engine, 2, "wrapper_job.py")


@pytest.mark.parametrize("case", cases_of("scripts_job.py"))
@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_other_peoples_scripts(engine, case):
    assert case in held(engine, 2, "scripts_job.py")


@pytest.mark.parametrize("case", cases_of("refused_job.py"))
def test_uses_that_cannot_be_right(case):
    assert case in held("torchrun", 2, "refused_job.py")


@pytest.mark.parametrize("case", cases_of("bind_job.py"))
def test_bind(case):
    assert case in held("horovodrun", 2, "bind_job.py")


@pytest.mark.parametrize("case", cases_of("alone_job.py"))
def test_bind_alone(case):
    assert case in held("horovodrun", 1, "alone_job.py")


@pytest.mark.parametrize("case", cases_of("policy_job.py"))
def test_policies(case):
    assert case in held("horovodrun", 2, "policy_job.py")


def test_hvd_can_be_shut_down_and_initialized_again():
    """The process groups of earlier optimizers have gone with the first shutdown."""
    assert job("torchrun", 2, "init_again_job.py").count("ok") == 3
