"""The command line: what `list` and `show` print is what the parts declare, and --json prints nothing else."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import grace_ext
from grace_ext.catalogue import KINDS
from grace_ext.cli import app

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
    """Text, knobs with ranges and effect, wire cost, what fits; in JSON and in words."""
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
    """efsignsgd is a compressor and a memory."""
    assert {part["kind"] for part in json.loads(said("show", "efsignsgd", "--json"))} == {"compressor", "memory"}
