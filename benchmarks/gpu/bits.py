"""Compares every spec of the catalogue on the device with the numpy form on the host, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

import grace_ext
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.section import Found, Progress, Section, none_of, short
from grace_ext.papers.experiment import in_units

RANKS, STEPS = 2, 3
#: How far an array may be from the CPU's if a compressor's bytes may differ, because matrix products round differently: this share of its
#: largest element, and a little. Single elements may cancel, so they have no limit of their own.
RELATIVE, ABSOLUTE = 1e-2, 1e-4
#: A GPU's run has more than one block of every kernel; a dry run is small.
LARGE, SMALL = {"long": (70_001,), "wide": (300, 700)}, ("scalar", "vector", "matrix", "strided")


def specs(dry: bool) -> list[str]:
    """Returns all specs of the contract suite and its policies; in a dry run specs in which every part occurs. Policies that go by measured
    times are left out, because two runs of them choose differently."""
    from tests import catalog

    policies = [text for text in catalog.POLICIES if not any(policy.timed for policy in grace_ext.grace(text).policies)]
    return [*(catalog.shelf() if dry else catalog.ALL), *policies]


def history(world: Any, text: str, shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, str, dict[str, np.ndarray]]]:
    """Makes steps of a cluster, in one of them with a gradient of zeros. Returns (kind, label, arrays by name) of all that was sent,
    returned and kept."""
    from grace_ext.testing import inputs
    from grace_ext.testing.worlds import states, tapped

    cluster, outs = world.in_place(world.cluster(grace_ext.grace(text), RANKS)), []
    with np.errstate(all="ignore"), tapped() as seen:
        for step in range(STEPS):
            gradients = inputs.ranks(RANKS, step, shapes=shapes)
            if step == 1:
                gradients[0]["matrix"][...] = 0
            outs.append({name: np.array(array) for name, array in world.step(cluster, gradients).items()})
    sent = [("payload", one.label, {str(rank): np.frombuffer(data, np.uint8) for rank, data in enumerate(one.buffers)}) for one in seen]
    kept = [("state", f"rank {rank}", held) for rank, held in enumerate(states(cluster, world))]
    return [*sent, *(("result", f"step {step}", out) for step, out in enumerate(outs)), *kept]


def difference(world: Any, text: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Returns in words what differs first from the host's; None if nothing does."""
    from grace_ext.testing.worlds import NUMPY

    g = grace_ext.grace(text)
    exact = all(leaf.compressor.deterministic_bytes for leaf in g.leaves)
    ours, theirs = history(world, text, shapes), history(NUMPY, text, shapes)
    if [(kind, label) for kind, label, _ in ours] != [(kind, label) for kind, label, _ in theirs]:
        return "other collectives than on the host"
    for (kind, label, mine), (_, _, expected) in zip(ours, theirs, strict=True):
        if set(mine) != set(expected):
            return f"{kind} {label}: {sorted(set(mine) ^ set(expected))} on one side only"
        for name, array in expected.items():
            if exact and mine[name].tobytes() != array.tobytes():
                return f"{kind} {label}, {name}: {_distance(mine[name], array)}"
            if not exact and kind != "payload" and not _near(mine[name], array):
                return f"{kind} {label}, {name}: {_distance(mine[name], array)}, and {RELATIVE:g} of the largest is allowed"
    return None


def _near(mine: np.ndarray, array: np.ndarray) -> bool:
    if mine.shape != array.shape:
        return False
    largest = float(np.abs(array.astype(np.float64)).max(initial=0.0))
    return np.allclose(mine.astype(np.float64), array.astype(np.float64), rtol=0.0, atol=ABSOLUTE + RELATIVE * largest)


def _distance(mine: np.ndarray, array: np.ndarray) -> str:
    if mine.shape != array.shape or mine.dtype != array.dtype:
        return f"{mine.dtype}{list(mine.shape)} where the host has {array.dtype}{list(array.shape)}"
    differ = int((mine != array).sum())
    return f"{differ:,} of {array.size:,} elements differ, by at most {np.abs(mine.astype(np.float64) - array).max():.3g}"


def run(machine: Machine, progress: Progress) -> Found:
    world = machine.world("torch-cuda")
    from grace_ext.testing.inputs import SHAPES

    every = specs(machine.dry)
    shapes = {name: SHAPES[name] for name in SMALL} if machine.dry else {**SHAPES, **LARGE}
    rows, done = [], in_units(progress, len(every))
    for text in every:
        try:
            differs = difference(world, text, shapes)
        except Exception as error:  # a fault of one spec must not hide those of others
            differs = short(error)
        if differs:
            rows.append([text, differs])
        done()
    notes = [
        f"{len(every)} specs, {RANKS} ranks, {STEPS} steps, {len(shapes)} tensors: payloads, results and states against numpy on the host",
        f"where the contract lets payloads differ (matrix products): results and states, within {RELATIVE:g} of the largest element",
    ]
    return Found(["spec", "what differs"], rows, [none_of("specs that differ from the CPU", len(every), rows)], notes=notes)


SECTION = Section("bits", "every spec of the catalogue gives the CPU's bits", "the pretended device, with every part once", run)
