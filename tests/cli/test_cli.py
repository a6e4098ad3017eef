"""`grace-ext list` and `show` print what the parts declare, `bench` measures them, and --json prints nothing but JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import grace_ext
from grace_ext.cli.app import app
from grace_ext.cli.catalogue import KINDS

RUN = CliRunner()


def said(*arguments: str) -> str:
    done = RUN.invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_list_names_every_part():
    catalogue, table = json.loads(said("list", "--json")), said("list")
    for kind, module in KINDS.items():
        assert [part["name"] for part in catalogue[kind]] == list(module.names())
        for part in catalogue[kind]:
            assert part["name"] in table and part["summary"].endswith(".")


@pytest.mark.parametrize("kind", KINDS)
def test_show_tells_all_of_every_part(kind):
    """`show` gives text, knobs with ranges and effects, wire cost and compatible parts, in JSON and in words."""
    for name in KINDS[kind].names():
        found = [part for part in json.loads(said("show", name, "--json")) if part["kind"] == kind]
        (part,) = found
        words = said("show", name)
        assert part["text"].splitlines()[0] in words and ("Source: " in part["text"] or name == "none" or kind == "communicator")
        for knob in part["knobs"]:
            assert knob["name"] in words and knob["range"] and knob["help"]
        if kind == "compressor":
            assert part["memories"] and part["communicators"] and part["bits_per_element"] > 0
            natural = part["natural"]
            assert natural["communicator"] in part["communicators"]
            grace_ext.grace(f"{name} + {natural['memory']} @ {natural['communicator']}")
        elif kind == "memory":
            assert part["compressors"]


def test_an_unknown_name_gets_the_nearest_and_exit_2():
    done = RUN.invoke(app, ["show", "topkk"])
    assert done.exit_code == 2 and "topk" in done.output


def test_a_name_of_two_kinds_shows_both():
    """efsignsgd is both a compressor and a memory."""
    assert {part["kind"] for part in json.loads(said("show", "efsignsgd", "--json"))} == {"compressor", "memory"}


def test_bench_times_parts_and_says_what_they_send(monkeypatch):
    """Bare names get their natural memory, and the figures that do not depend on time are right."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = json.loads(said("bench", "topk", "threshold(threshold=1e-3) + none", "fp16", "--elements", "60000", "--times", "1", "--json"))
    topk, threshold, fp16 = made["rows"]
    assert topk["spec"] == "topk(ratio=0.01) + residual @ allgather" and made["machine"]["threads"] == 1
    assert abs(topk["bytes_per_element"] - 0.0507) < 0.001 and fp16["bytes_per_element"] == 2
    assert threshold["bytes_per_element"] < 1e-3 and threshold["error"] == 1  # no element reaches the threshold
    assert 0.9 < topk["error"] < 1 and fp16["error"] < 1e-2
    assert all(row["encode"] >= 0 and row["decode"] > 0 and abs(row["elements"] - 60000) < 600 for row in made["rows"])


def test_bench_measures_every_part(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = json.loads(said("bench", "--elements", "2000", "--times", "1", "--json"))["rows"]
    assert len(rows) == len(grace_ext.compressors.names())
    assert all(row["encode"] >= 0 and np.isfinite(row["error"]) for row in rows)


def test_bench_refuses_a_part_that_is_not_there_before_it_measures(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome = CliRunner().invoke(app, ["bench", "topk", "topj"])
    assert isinstance(outcome.exception, grace_ext.errors.UnknownPartError) and "topk" in outcome.exception.nearest
