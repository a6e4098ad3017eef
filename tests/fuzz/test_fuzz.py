"""Fuzzes every decoder, compiled and plain, for a short time with fixed seeds; benchmarks/reliability/fuzz.py does so for a long time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grace_ext.testing.worlds import WITH_DEVICE

from .. import catalog
from .decoders import greeted, of_whole_steps, others
from .exchanges import LARGE, ExchangeTarget, StepTarget

pytestmark = pytest.mark.filterwarnings("ignore")
SPECS = catalog.NATURAL + [spec for spec in catalog.MIXES if spec not in catalog.NATURAL]
FIRST = ("numpy", "numpy-plain")
BY_NAME = {world.name: world for world in WITH_DEVICE}
DEVICES = [name for name in ("torch-device", "torch-cuda") if name in BY_NAME]
OTHERS = {(name, target.name): target for name in FIRST for target in others(BY_NAME[name].ops)}
OTHERS |= {(name, target.name): target for name in DEVICES for target in of_whole_steps(BY_NAME[name].ops)}


def run(target, count: int, seed: int = 0) -> dict[str, int]:
    """Feeds `count` damaged inputs. Returns how many were refused and accepted."""
    seen = {"refused": 0, "accepted": 0}
    inputs = target.inputs(random.Random(f"{target.name} {seed}"))
    with np.errstate(all="ignore"):
        for _, (slot, data) in zip(range(count), inputs, strict=False):
            seen[target.feed(slot, data)] += 1
    return seen


@pytest.mark.parametrize("world", FIRST)
@pytest.mark.parametrize("part", range(8))
def test_exchanges(world, part):
    """For every composition, damage is refused if it can be detected; damage that gives another valid value cannot."""
    total = {"refused": 0, "accepted": 0}
    for spec in SPECS[part::8]:
        for outcome, count in run(ExchangeTarget(BY_NAME[world].ops, spec), 12 if world == "numpy" else 6).items():
            total[outcome] += count
    assert min(total.values()) > 50, total


@pytest.mark.parametrize("spec", [spec for spec in catalog.PLAIN if "(" not in spec])
def test_exchanges_of_large_tensors(spec):
    """Tensors are large enough for kernels to work in pieces."""
    run(ExchangeTarget(BY_NAME["numpy"].ops, spec, LARGE), 4)


@pytest.mark.parametrize(("world", "name"), OTHERS)
def test_others(world, name):
    seen = run(OTHERS[world, name], 60 if world in DEVICES or "report" in name or "agreement" in name else 200)
    assert seen["refused"] > 20, seen


@pytest.mark.parametrize("world", DEVICES)
def test_devices(world):
    """Torch operations, as used for other devices, hold for one spec per compressor."""
    total = {"refused": 0, "accepted": 0}
    for spec in [spec for spec in catalog.PLAIN if "(" not in spec]:
        for outcome, count in run(StepTarget(BY_NAME[world].ops, spec), 6).items():
            total[outcome] += count
    assert min(total.values()) > 30, total


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200), place=st.integers(0, 10**6), cut=st.integers(0, 10**6), spec=st.sampled_from(catalog.PLAIN))
def test_any_bytes_anywhere(data, place, cut, spec):
    """Hypothesis chooses which bytes are written where in a valid message, and minimizes failures."""
    target = _made(spec)
    slot = place % len(target.slots)
    honest = target.slots[slot].honest
    at = cut % (len(honest) + 1)
    with np.errstate(all="ignore"):
        target.feed(slot, honest[:at] + data + honest[at + len(data) :])


_known: dict[str, ExchangeTarget] = {}


def _made(spec: str) -> ExchangeTarget:
    if spec not in _known:
        _known[spec] = ExchangeTarget(BY_NAME["numpy"].ops, spec)
    return _known[spec]


@pytest.mark.parametrize("hello", [b"", b"\0" * 36, b"x" * 35, b"y" * 4000])
def test_a_stranger_does_not_keep_ranks_from_meeting(hello):
    assert not greeted(hello)
