"""Tests that docs/papers.md is what the experiments' descriptions and results say, and that an experiment can fail."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers.page import page
from benchmarks.papers.papers import EXPERIMENTS, PAGE, RESULTS
from grace_ext.papers import counterexample
from grace_ext.papers.experiment import Check, Outcome


def results():
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in EXPERIMENTS if (RESULTS / f"{name}.json").exists()}


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(EXPERIMENTS, results()), "run python benchmarks/papers/papers.py --page"


def test_every_experiment_has_a_result_and_its_picture():
    found = results()
    assert set(found) == set(EXPERIMENTS) == {file.stem for file in RESULTS.glob("*.json")}
    for name, result in found.items():
        assert not result["curves"] or (PAGE.parent / "pictures" / f"papers-{name}.png").exists(), name
        assert result["reproduced"] == all(holds for _, _, holds in result["checks"]) and result["checks"], name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_descriptions_are_complete(name):
    one = EXPERIMENTS[name]
    for text in (one.title, one.paper, one.claim, one.figure, one.recipe, one.criterion):
        assert len(text) > 10, text
    assert one.name == name


def test_an_experiment_runs_and_a_condition_that_does_not_hold_is_a_verdict(monkeypatch):
    shares = []
    outcome = counterexample.run(True, shares.append)
    assert outcome.reproduced and shares == sorted(shares) and shares[-1] == 1
    assert [row[0] for row in outcome.rows] == [*counterexample.SPECS] * 2
    monkeypatch.setattr(counterexample, "STUCK", 1.0)
    assert not counterexample.run(True, shares.append).reproduced
    assert not Outcome([], [], [Check("one", 1.0, True), Check("two", 2.0, False)]).reproduced


def test_a_bar_in_a_spec_does_not_end_a_cell():
    found = {"columns": ["spec", "x"], "rows": [["gaussian() | none", 1.0]], "checks": [["a | b", 1.0, True]], "curves": []}
    stamp = {"reproduced": True, "seconds": 1.0, "date": "", "commit": ""}
    lines = page({"counterexample": counterexample.EXPERIMENT}, {"counterexample": {**found, **stamp}}).splitlines()
    assert r"| `gaussian() \| none` | 1 |" in lines and r"| a \| b | 1 | yes |" in lines
