"""Error feedback conserves: what was sent and what is kept add up to what there was, in the precision of the wire."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import grace_ext

from .. import catalog, inputs
from ..worlds import NUMPY, World, states

# How each memory's new state follows from the old one. A new memory states its law here, or this file fails.
CONSERVING = {"residual"}
STATELESS = {"none"}
ULP = 2.0**-24


def test_every_memory_has_a_law():
    """A memory that is registered is also tested."""
    assert set(grace_ext.memories.names()) == CONSERVING | STATELESS


class Recorder:
    """Sees what every memory was given by wrapping its `after`."""

    def __init__(self, memory, ops):
        self.calls: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        original = type(memory).after

        def after(part, ops_, compensated, sent, spec, info, state):
            self.calls.append((spec.name, info.rank, np.array(ops.host(compensated)), np.array(ops.host(sent.values()))))
            return original(part, ops_, compensated, sent, spec, info, state)

        self.patch = mock.patch.object(type(memory), "after", after)


def _exact(g, dtype: str) -> bool:
    """Whether what the compressor leaves behind is representable in float32."""
    unscaled = not getattr(g.compressor, "scale", False)
    return g.compressor.name in catalog.EXACT_VALUES and unscaled and dtype != "float64"


def check_conservation(world: World, spec: str, dtype: str, shapes, steps: int) -> None:
    g = grace_ext.grace(spec)
    memory, size = g.memory, 2
    cluster = world.cluster(g, size)
    held: list[dict[str, np.ndarray]] = [{} for _ in range(size)]
    for step in range(steps):
        gradients = inputs.ranks(size, step, dtype, shapes)
        recorder = Recorder(memory, world.ops)
        with recorder.patch:
            world.step(cluster, gradients)
        after = states(cluster, world)
        checked = set()
        for name, rank, compensated, sent in recorder.calls:
            wide = np.float64 if dtype == "float64" else np.float32
            g_now = gradients[rank][name].astype(wide).reshape(-1)
            r_old = held[rank].get(f"residual/{name}", np.zeros(g_now.size, np.float32))
            r_new = after[rank][f"residual/{name}"].astype(np.float64)
            if memory.beta == memory.gamma == 1:
                assert np.array_equal(compensated, r_old.astype(wide) + g_now)
            else:
                parts = memory.beta * r_old.astype(np.float64), memory.gamma * g_now.astype(np.float64)
                slack = 4 * ULP * (np.abs(parts[0]) + np.abs(parts[1])) + 1e-44
                assert (np.abs(compensated - (parts[0] + parts[1])) <= slack).all()
            assert sent is not None
            error = sent.astype(np.float64) + r_new - compensated.astype(np.float64)
            if _exact(g, dtype):
                assert not error.any(), (name, rank, step)
            else:
                assert (np.abs(error) <= ULP * np.abs(compensated - sent.astype(np.float64)) + 1e-44).all(), (name, rank, step)
            checked.add((name, rank))
        assert checked == {(name, rank) for name, shape in shapes.items() if 0 not in shape for rank in range(size)}
        held = after


@pytest.mark.parametrize(("world", "spec"), catalog.on_worlds([s for s in catalog.ALL if "+ residual" in s]))
def test_conservation_in_float32(world, spec):
    """g + r_old == sent + r_new over several steps, for every compressor and communicator."""
    check_conservation(world, spec, "float32", inputs.SHAPES, steps=3)


@pytest.mark.parametrize(("world", "spec", "dtype"), catalog.on_worlds(catalog.FEEDBACK, *list(inputs.DTYPES)[1:], worlds=[NUMPY]))
def test_conservation_in_other_dtypes(world, spec, dtype):
    """Half-precision gradients keep a float32 residual; a float64 gradient is conserved to float32 rounding of what is kept."""
    check_conservation(world, spec, dtype, inputs.SHAPES, steps=2)


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_conservation_of_a_large_tensor(spec):
    """As above where blocks and pieces have many rounds."""
    shape = (500, 200) if spec.startswith("powersgd") else (100_000,)
    check_conservation(NUMPY, spec, "float32", {"big": shape}, steps=2)


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_what_is_remembered_as_sent_is_what_arrives(world, spec):
    """A rank alone gets exactly what its memory believes it has sent; otherwise feedback would correct the wrong error."""
    g = grace_ext.grace(spec)
    cluster = world.cluster(g, 1)
    for step in range(2):
        recorder = Recorder(g.memory, world.ops)
        with recorder.patch:
            out = world.step(cluster, inputs.ranks(1, step))
        for name, _, _, sent in recorder.calls:
            got = out[name].reshape(-1)
            if g.compressor.name == "signsgd" and g.compressor.ties == "plus":
                assert np.array_equal(got[sent != 0], sent[sent != 0])
            elif not g.compressor.averages:
                assert np.array_equal(got, np.sign(sent)), name  # the direction of what was sent
            elif g.compressor.name == "powersgd":
                assert np.allclose(got, sent, rtol=1e-5, atol=1e-6)  # one product of matrices, or two
            else:
                assert np.array_equal(got, sent), name


def test_the_state_is_one_float32_residual_per_parameter(world):
    """State is flat, in float32 for every gradient dtype, and named residual/<parameter>."""
    for dtype in inputs.DTYPES:
        cluster = world.cluster(grace_ext.grace("topk(ratio=0.25) + residual"), 2)
        world.step(cluster, inputs.ranks(2, 0, dtype))
        for held in states(cluster, world):
            assert set(held) == {f"residual/{name}" for name, shape in inputs.SHAPES.items() if 0 not in shape}
            assert all(array.dtype == np.float32 and array.ndim == 1 for array in held.values())
