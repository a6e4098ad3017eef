"""Tests that no spec's step costs more on a device than its budget: launches, waits of the host, copies, and bytes moved.

tools/device_budgets.py writes the table. After a change for the better run it, so that the better numbers are held from then on.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "device_budgets.py"
spec = importlib.util.spec_from_file_location("device_budgets", TOOL)
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
BUDGETS = json.loads(tool.FILE.read_text())


def test_every_spec_has_a_budget():
    assert list(BUDGETS) == list(tool.SPECS) and all(list(buckets) == list(tool.BUCKETS) for buckets in BUDGETS.values())


@pytest.mark.parametrize("bucket", tool.BUCKETS)
@pytest.mark.parametrize("text", tool.SPECS)
def test_a_step_costs_no_more_than_its_budget(text, bucket):
    costs, budget = tool.measure(text, tool.BUCKETS[bucket]), BUDGETS[text][bucket]
    assert {name: cost for name, cost in costs.items() if cost > budget[name]} == {}, budget
