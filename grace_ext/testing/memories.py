"""Tests that every memory must pass, on every installed tensor library. See `memory_contract`."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext

from ..errors import IncompatiblePartsError
from ..exchange.message import HEADER
from ..parts.field import ITEMSIZE
from ..parts.state import is_own
from ..parts.tensor import StepInfo, TensorSpec
from . import inputs
from .checks import (
    BESIDE,
    SHAPES,
    accepted,
    check_huge,
    check_in_place,
    check_no_view,
    check_one_bad_rank,
    check_registered,
    check_resume,
    check_shapes,
    check_zeros,
    legal,
    suite,
)
from .worlds import NUMPY, WITH_DEVICE, World, same_bits, states, tapped

#: A memory is tested with those of these compressors that it accepts.
COMPRESSORS = ("topk(ratio=0.25)", "threshold(threshold=0.5)", "randomk(ratio=0.25)", "efsignsgd", "qsgd(bits=4)", "powersgd", "none")


def memory_contract(*texts: str) -> type:
    """Returns a class of tests for these memories, given by spec strings ('mine', 'mine(knob=2)'). Assign it to a name that begins with
    Test.

    With every compressor of COMPRESSORS that the memory accepts, the tests check: registration, configuration, shapes and dtypes, equal
    results on all ranks (unless it `diverges`), purity, the same bits in every tensor library, the declared number of `sends`, NaN on one
    rank, resuming, and what the memory declares of its state (`shared_state`, `mean_state`, `zero_sum_state`).
    """
    specs = {text: [f"{compressor} + {text}" for compressor in accepted(COMPRESSORS, f"+ {text}")] for text in texts}
    # Other libraries differ from the reference in their arithmetic only, for which one compressor is enough.
    pairs = [
        pytest.param(w, spec, id=f"{w.name}-{spec}")
        for w in WITH_DEVICE
        for text in texts
        for spec in specs[text][: None if w is NUMPY else 1]
    ]
    return suite(
        "TestMemoryContract",
        (Everywhere, "world, spec", pairs),
        (State, "spec", [spec for text in texts for spec in specs[text]]),
        (Declared, "spec", [specs[text][0] for text in texts]),
    )


class Everywhere:
    """The tests that run in every tensor library."""

    def test_shapes_dtypes_and_equal_ranks(self, world: World, spec: str):
        """0-d, empty, one-element, strided and other tensors keep shape and dtype, are finite, and have the same bytes on every rank."""
        for dtype in inputs.DTYPES if world is NUMPY else ("float32",):
            check_shapes(world, spec, dtype)

    def test_no_view_of_the_gradient(self, world: World, spec: str):
        """The gradient is not modified; overwriting it, or the result, after the step does not change the state."""
        check_no_view(world, spec)

    def test_the_same_as_numpy(self, world: World, spec: str):
        """The same results and state as the reference, or close to them if the compressor's bytes may differ."""
        g, runs = grace_ext.grace(spec), []
        for one in (world, NUMPY):
            cluster = one.cluster(g, 2)
            outs = [one.step(cluster, inputs.ranks(2, step)) for step in range(3)]
            runs.append([*outs, *states(cluster, one)])
        for ours, theirs in zip(*runs, strict=True):
            if g.compressor.deterministic_bytes:
                assert same_bits(ours, theirs)
            else:
                assert all(np.allclose(ours[n].astype("f8"), theirs[n].astype("f8"), rtol=1e-2, atol=1e-4) for n in theirs)

    def test_in_place(self, world: World, spec: str):
        """Results that are written over the gradients are the same bits, whatever communicator carries the payloads."""
        for one in legal(f"{spec} {rest}" for rest in (BESIDE if world is NUMPY else BESIDE[:3])) if world.mutable else ():
            check_in_place(world, one)

    def test_one_bad_rank(self, world: World, spec: str):
        """With a few or many NaN on one of two ranks, or on both, both return NaN, and no state changes; the next step works as if
        these had not been made."""
        check_one_bad_rank(world, spec)

    def test_resume_is_bit_exact(self, world: World, spec: str):
        """A fresh cluster that loads the state continues exactly like the one that was saved."""
        check_resume(world, spec)


class State:
    """The tests of what the memory declares of its state, and of what it sends."""

    def test_zeros_stay_zeros(self, spec: str):
        """Zero gradients give zeros, and leave no residual."""
        check_zeros(NUMPY, spec, SHAPES)

    def test_huge_values_do_not_poison_the_state(self, spec: str):
        """After gradients near the largest float, later steps and the state are finite."""
        check_huge(NUMPY, spec)

    def test_it_sends_at_most_what_it_declares(self, spec: str):
        """Each rank hands at most `sends` times the declared payloads to collectives, headers and flags excluded."""
        g = grace_ext.grace(spec)
        cluster = NUMPY.cluster(g, 2)
        declared = sum(g.nbytes(TensorSpec(name, shape)) for name, shape in SHAPES.items())
        for step in range(3):
            with tapped() as seen:
                NUMPY.step(cluster, inputs.ranks(2, step, shapes=SHAPES))
            overhead = sum(ITEMSIZE[s.dtype] if s.kind == "allreduce" else HEADER.size for s in seen)
            assert max(cluster.wire_bytes) <= declared + overhead

    def test_state_is_what_is_declared(self, spec: str):
        """Keys are its own; shared arrays are equal on all ranks, means are means of all ranks, and zero-sum arrays sum to zero."""
        g = grace_ext.grace(spec)
        memory, cluster = g.memory, NUMPY.cluster(g, 3)
        own = set(memory.init(NUMPY.ops, TensorSpec("m", SHAPES["m"]), StepInfo(0, 0, 3, 3)))
        assert not any(is_own(key) or "/" in key for key in own), f"keys with ':' or '/' belong to others: {own}"
        for step in range(3):
            NUMPY.step(cluster, inputs.ranks(3, step, shapes=SHAPES))
            held = states(cluster, NUMPY)
            for key in own:
                arrays = [rank[f"{key}/m"].astype(np.float64) for rank in held]
                scale = max(np.abs(array).max() for array in arrays) + 1e-30
                if key in memory.shared_state or key in memory.mean_state:
                    assert all(np.array_equal(array, arrays[0]) for array in arrays), f"{key} differs between ranks"
                if key in memory.mean_state:
                    mean = sum(rank[f"{memory.mean_state[key]}/m"].astype(np.float64) for rank in held) / 3
                    assert np.abs(arrays[0] - mean).max() <= 1e-5 * (scale + np.abs(mean).max()), f"{key} is no mean"
                if key in memory.zero_sum_state:
                    assert np.abs(sum(arrays)).max() <= 1e-5 * scale, f"{key} does not add up to zero"


class Declared:
    """The tests of the memory itself."""

    def test_is_a_registered_value(self, spec: str):
        """It is found by name, equal if its knobs are, and the same after a round trip through JSON and through its string."""
        g = grace_ext.grace(spec)
        check_registered(g.memory, spec, grace_ext.grace(f"{g.compressor} + {g.memory}").memory)

    def test_rejects_by_the_right_error(self, spec: str):
        """`check` rejects a compressor that does not fit by an IncompatiblePartsError that names the memory, for every compressor."""
        memory = grace_ext.grace(spec).memory
        for name in grace_ext.compressors.names():
            try:
                memory.check(grace_ext.compressors.get(name).create())
            except IncompatiblePartsError as error:
                assert memory.name in str(error)
