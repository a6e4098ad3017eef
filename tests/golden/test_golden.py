"""The wire format is frozen: any change of a payload, a header or the random generator fails here."""

from __future__ import annotations

import json

import pytest

import grace_ext

from . import messages, regenerate

FROZEN = json.loads(regenerate.PATH.read_text())


def test_the_frozen_specs_are_the_tested_ones():
    """payloads.json has exactly SPECS, with every compressor whose bytes are reproducible."""
    assert tuple(FROZEN["messages"]) == messages.SPECS
    frozen = {grace_ext.grace(spec).compressor.name for spec in messages.SPECS}
    reproducible = {n for n in grace_ext.compressors.names() if grace_ext.compressors.get(n).create().deterministic_bytes}
    assert frozen == reproducible, "add the new compressor to SPECS and regenerate; the other entries must not change"


@pytest.mark.parametrize("spec", messages.SPECS)
def test_messages(world, spec):
    """Every byte that two ranks hand to collectives in two steps is as frozen."""
    assert messages.messages(world, spec) == FROZEN["messages"][spec]


def test_generator():
    """Keys, words, positions and normals of the random generator are as frozen."""
    assert messages.generator() == FROZEN["generator"]


def test_sizes():
    assert messages.digests() == FROZEN["sizes"]


def test_regenerating_needs_the_flag(capsys):
    """Without the flag, regenerate changes nothing."""
    before = regenerate.PATH.read_bytes()
    assert regenerate.main([]) == 2 and regenerate.main(["--help"]) == 2
    assert regenerate.PATH.read_bytes() == before and regenerate.FLAG in capsys.readouterr().err
