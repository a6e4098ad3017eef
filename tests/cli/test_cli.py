"""`grace-ext list` and `show` print what the parts declare, `bench` measures them, and --json prints nothing but JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

import grace_ext
from grace_ext.cli.app import app
from grace_ext.cli.catalogue import KINDS
from grace_ext.composition import making
from grace_ext.planning.candidates import completed

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


@pytest.mark.parametrize(("name", "told"), [
    ("topkk", "no part named 'topkk'; did you mean topk? `grace-ext list` lists all parts.\n"),
    ("TopK(ratio=0.1)", "no part named 'TopK'; did you mean topk? `grace-ext list` lists all parts.\n"),
    ("zzzz", "no part named 'zzzz'. `grace-ext list` lists all parts.\n"),
    ("topk + residuel", "no memory named 'residuel'; did you mean residual? `grace-ext list` lists all parts.\n"),
])  # fmt: skip
def test_an_unknown_name_gets_the_nearest_and_exit_2(name, told):
    done = RUN.invoke(app, ["show", name])
    assert (done.exit_code, done.output) == (2, told)


def test_show_takes_knobs_and_specs():
    """Knobs that were given are shown beside their defaults, and count for bits, recommendation and partners; a spec shows its parts."""
    (plain,), (topk,) = (json.loads(said("show", text, "--json")) for text in ("topk", "topk(ratio=0.1, values='fp16')"))
    values = {knob["name"]: (knob["value"], knob["default"]) for knob in topk["knobs"]}
    assert values == {"ratio": (0.1, 0.01), "values": ("fp16", "fp32"), "index": ("auto", "auto")}
    assert topk["bits_per_element"] > 5 * plain["bits_per_element"] and topk["spec"] == "topk(ratio=0.1, values='fp16')"
    words = said("show", "topk(ratio=0.1)")
    for text in ("compressor topk(ratio=0.1)", "ratio = 0.1 (default 0.01)", "with these knobs", "Recommended: topk(ratio=0.1) + residual"):
        assert text in words
    assert "(default" not in said("show", "topk") and "with the default knobs" in said("show", "topk(ratio=0.01)")
    spec = json.loads(said("show", "topk > qsgd + residual @ allgather", "--json"))
    assert [(part["kind"], part["name"]) for part in spec] == [
        ("compressor", "pipeline"), ("memory", "residual"), ("communicator", "allgather"),
    ]  # fmt: skip
    assert json.loads(said("show", "by_size(large=topk + residual)", "--json"))[0]["kind"] == "policy"
    assert [part["kind"] for part in json.loads(said("show", "efsignsgd(block=64)", "--json"))] == ["compressor"]  # the memory has no block
    for wrong in ("topk(ratio=5)", "topk(", "efsignsgd(zzz=1)"):
        assert isinstance(RUN.invoke(app, ["show", wrong]).exception, grace_ext.GraceError)


@pytest.mark.parametrize("name", grace_ext.compressors.names())
def test_the_recommended_memory_is_one(name):
    """`show`, the warning, the text, and what plan and bench add name the same memory."""
    (part,) = [part for part in json.loads(said("show", name, "--json")) if part["kind"] == "compressor"]
    memory = part["natural"]["memory"]
    assert f"Recommended: {name} + {memory} @ {part['natural']['communicator']}" in said("show", name)
    making.warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grace_ext.grace(name)
    warned = [re.search(r"Add error feedback: '(.*)' \(or", str(warning.message)).group(1) for warning in caught]
    assert warned == ([f"{grace_ext.compressors.get(name)()} + {memory}"] if memory != "none" else [])
    text = " ".join(part["text"].split())
    named = re.search(r"(?:[Pp]air (?:it )?with|useless without) '([^']+)'", text)
    assert (named.group(1) if named else "none") == memory
    assert completed(name) == grace_ext.grace(f"{name} + {memory}")


def test_a_name_of_two_kinds_shows_both():
    """efsignsgd is both a compressor and a memory."""
    assert {part["kind"] for part in json.loads(said("show", "efsignsgd", "--json"))} == {"compressor", "memory"}


def test_bench_times_parts_and_says_what_they_send(monkeypatch):
    """Bare names get their natural memory, and the figures that do not depend on time are right."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = json.loads(said("bench", "topk", "threshold(threshold=1e-3) + none", "fp16", "--elements", "60000", "--times", "1", "--json"))
    assert made["notices"] == ["topk was given no memory, so it has its natural one: topk(ratio=0.01) + residual @ allgather"]
    topk, threshold, fp16 = made["rows"]
    assert topk["spec"] == "topk(ratio=0.01) + residual @ allgather" and made["machine"]["threads"] == 1
    assert abs(topk["bytes_per_element"] - 0.0507) < 0.001 and fp16["bytes_per_element"] == 2
    assert threshold["bytes_per_element"] < 1e-3 and threshold["error"] == 1  # no element reaches the threshold
    assert 0.9 < topk["error"] < 1 and fp16["error"] < 1e-2
    assert all(row["encode"] >= 0 and row["decode"] > 0 and abs(row["elements"] - 60000) < 600 for row in made["rows"])


def test_bench_completes_specs_with_knobs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table = said("bench", "topk(ratio=0.1)", "qsgd", "--elements", "2000", "--times", "1")
    assert "topk(ratio=0.1) + residual @ allgather" in table.split("Note: ")[0] and table.count("Note: ") == 1
    assert "Note: topk(ratio=0.1) was given no memory, so it has its natural one: topk(ratio=0.1) + residual @ allgather.\n" in table


def test_bench_measures_every_part(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = json.loads(said("bench", "--elements", "2000", "--times", "1", "--json"))["rows"]
    assert len(rows) == len(grace_ext.compressors.names())
    assert all(row["encode"] >= 0 and np.isfinite(row["error"]) for row in rows)


def test_bench_refuses_a_part_that_is_not_there_before_it_measures(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome = CliRunner().invoke(app, ["bench", "topk", "topj"])
    assert isinstance(outcome.exception, grace_ext.errors.UnknownPartError) and "topk" in outcome.exception.nearest


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["list", "list --json", "show topk", "--help", "--version"])
def test_output_to_a_full_device(command):
    """It is one line and an exit status, without a traceback."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "grace_ext", *command.split()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "grace-ext: the output cannot be written: No space left on device"
