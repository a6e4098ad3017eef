"""The wire format is frozen: any change of a payload, a header or the random generator shows here."""

from __future__ import annotations

import json

import pytest

import grace_ext

from . import messages, regenerate

FROZEN = json.loads(regenerate.PATH.read_text())


def test_the_frozen_specs_are_the_tested_ones():
    """Every compressor with reproducible bytes is frozen."""
    assert tuple(FROZEN["messages"]) == messages.SPECS
    frozen = {grace_ext.grace(spec).compressor.name for spec in messages.SPECS}
    reproducible = {n for n in grace_ext.compressors.names() if grace_ext.compressors.get(n).create().deterministic_bytes}
    assert frozen == reproducible, "add the new compressor to SPECS and regenerate; the other entries must not change"


@pytest.mark.parametrize("spec", messages.SPECS)
def test_messages(world, spec):
    """Two ranks, two steps: every byte handed to a collective."""
    assert messages.messages(world, spec) == FROZEN["messages"][spec]


def test_generator():
    """Keys, words, positions and normals of the random generator."""
    assert messages.generator() == FROZEN["generator"]


def test_sizes():
    assert messages.digests() == FROZEN["sizes"]


def test_regenerating_needs_the_flag(capsys):
    """Running it by accident changes nothing."""
    before = regenerate.PATH.read_bytes()
    assert regenerate.main([]) == 2 and regenerate.main(["--help"]) == 2
    assert regenerate.PATH.read_bytes() == before and regenerate.FLAG in capsys.readouterr().err
