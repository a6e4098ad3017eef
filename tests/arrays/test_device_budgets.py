"""Tests that no spec's step costs more on a device than its budget: launches, waits of the host, copies, and bytes moved.

tools/device_budgets.py writes the table. After a change for the better run it, so that the better numbers are held from then on.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from unittest import mock

import pytest

from grace_ext.driver.driver import Driver

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


#: Specs whose sizes and choices need no number on the host.
NEVER_WAIT = [text for text in tool.SPECS if not text.startswith(("threshold", "dgc", "sidco", "sketch"))]


@pytest.mark.parametrize("text", NEVER_WAIT)
def test_the_host_waits_only_where_the_step_ends(text):
    """Hooks start a bucket, and `finish` takes it; all of their flags are read in one place, once."""
    judge, waited = Driver._judge, []

    def watched(driver):
        before = tool.COUNTS.waits
        judge(driver)
        waited.append(tool.COUNTS.waits - before)

    with mock.patch.object(Driver, "_judge", watched):
        costs = tool.measure(text, tool.BUCKETS["20 tensors"])
    assert waited[-tool.RANKS :] == [1] * tool.RANKS and costs["waits"] == 1


TOGETHER = [
    "none + none", "fp16 + none", "topk(ratio=0.01) + residual", "randomk(ratio=0.01) + residual(beta=0.9)", "signsgd + none",
    "efsignsgd + residual", "onebit + residual",
]  # fmt: skip


@pytest.mark.parametrize("text", TOGETHER)
def test_launches_do_not_grow_with_the_tensors(text):
    few, many = (tool.measure(text, ((40, 40),) * number)["launches"] for number in (2, 60))
    assert few == many
