"""Tests every part in real jobs of two ranks: one job per framework trains with all parts in turn."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

from .. import catalog
from .support.launch import job

SHELF = catalog.shelf()


@lru_cache
def held(framework: str) -> frozenset[str]:
    return frozenset(re.findall(r"SHELF (.+) ok", job("horovodrun", 2, "shelf_job.py", framework, *SHELF, timeout=600)))


@pytest.mark.parametrize("framework", ["torch", "keras"])
@pytest.mark.parametrize("spec", SHELF)
def test_trains_as_a_local_cluster(framework, spec):
    if framework == "keras":
        pytest.importorskip("tensorflow")
    assert spec in held(framework)
