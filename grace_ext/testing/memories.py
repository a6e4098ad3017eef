"""The contract that every memory keeps, on every tensor library that is installed. See `memory_contract`."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import grace_ext

from ..errors import IncompatiblePartsError
from ..exchange.message import HEADER
from ..parts.field import ITEMSIZE
from ..parts.state import is_own
from ..parts.tensor import StepInfo, TensorSpec
from . import inputs
from .compressors import check_no_view, check_shapes
from .worlds import NUMPY, WORLDS, World, same_bits, states, tapped

#: What a memory is tried with: those of these that it takes.
COMPRESSORS = ("topk(ratio=0.25)", "threshold(threshold=0.5)", "randomk(ratio=0.25)", "efsignsgd", "qsgd(bits=4)", "powersgd", "none")
SHAPES = {"a": (40,), "m": (24, 18)}


def memory_contract(*texts: str) -> type:
    """Returns a class of tests for these memories, by spec string ('mine', 'mine(knob=2)'): assign it to a name that begins with Test.

    Checked with every compressor of COMPRESSORS that the memory takes: registration, configuration, shapes and dtypes, equal results on all
    ranks (unless it `diverges`), purity, the same bits in every tensor library, the declared number of `sends`, NaN on one rank, resuming,
    and what is declared of its state (`shared_state`, `mean_state`, `zero_sum_state`).
    """
    for text in texts:
        if not accepted(text):
            raise ValueError(f"memory {text!r} takes none of {', '.join(COMPRESSORS)}: this suite cannot test it")
    pairs = [pytest.param(w, f"{c} + {t}", id=f"{w.name}-{c} + {t}") for w in WORLDS for t in texts for c in _tried(w, t)]
    everywhere = type("TestEverywhere", (Everywhere,), {"pytestmark": [pytest.mark.parametrize(("world", "spec"), pairs)]})
    specs = [f"{c} + {t}" for t in texts for c in accepted(t)]
    state = type("TestState", (State,), {"pytestmark": [pytest.mark.parametrize("spec", specs)]})
    declared = type("TestDeclared", (Declared,), {"pytestmark": [pytest.mark.parametrize("text", texts)]})
    return type("TestMemoryContract", (), {"TestEverywhere": everywhere, "TestState": state, "TestDeclared": declared})


def accepted(text: str) -> list[str]:
    """Returns those of COMPRESSORS that this memory takes."""
    found = []
    for compressor in COMPRESSORS:
        try:
            grace_ext.grace(f"{compressor} + {text}")
        except IncompatiblePartsError:
            continue
        found.append(compressor)
    return found


def _tried(world: World, text: str) -> list[str]:
    """All on the reference; on other libraries, whose arithmetic is what differs, the first."""
    return accepted(text) if world is NUMPY else accepted(text)[:1]


class Everywhere:
    """What holds in every tensor library."""

    def test_shapes_dtypes_and_equal_ranks(self, world: World, spec: str):
        """0-d, empty, one-element, strided and other tensors come back in shape and dtype, finite, the same bytes on every rank."""
        for dtype in inputs.DTYPES if world is NUMPY else ("float32",):
            check_shapes(world, spec, dtype)

    def test_no_view_of_the_gradient(self, world: World, spec: str):
        """The gradient is not modified; overwriting it, or the result, after the step changes nothing that is remembered."""
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

    def test_one_bad_rank(self, world: World, spec: str):
        """NaN on one of two ranks: all return NaN, nobody remembers anything of the step, and the next step is as if it had not been."""
        cluster = world.cluster(grace_ext.grace(spec), 2)
        world.step(cluster, inputs.ranks(2, 0, shapes=SHAPES))
        held, bad = states(cluster, world), inputs.ranks(2, 1, shapes=SHAPES)
        bad[1]["m"][3, 4] = np.nan
        with np.errstate(all="ignore"):
            returned = world.everywhere(cluster, bad)
        assert all(np.isnan(out["m"]).all() for out in returned)
        assert all(same_bits(a, b) for a, b in zip(held, states(cluster, world), strict=True))
        assert np.isfinite(world.step(cluster, inputs.ranks(2, 2, shapes=SHAPES))["m"]).all()

    def test_resume_is_bit_exact(self, world: World, spec: str):
        """A fresh cluster that loads the state continues exactly like the one that was saved."""
        g = grace_ext.grace(spec)
        cluster, fresh = world.cluster(g, 2), world.cluster(g, 2)
        for step in range(2):
            world.step(cluster, inputs.ranks(2, step))
        fresh.load_state_dict(copy.deepcopy(cluster.state_dict()))
        for step in (2, 3):
            assert same_bits(world.step(cluster, inputs.ranks(2, step)), world.step(fresh, inputs.ranks(2, step)))
            assert all(same_bits(a, b) for a, b in zip(states(cluster, world), states(fresh, world), strict=True))


class State:
    """What the memory declares of its state, and of what it sends."""

    def test_zeros_stay_zeros(self, spec: str):
        """Zero gradients give zeros, and nothing is owed afterwards."""
        cluster = NUMPY.cluster(grace_ext.grace(spec), 2)
        zeros = [{name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}] * 2
        for _ in range(2):
            assert not any(array.any() for array in NUMPY.step(cluster, zeros).values())
            assert not any(a.any() for held in states(cluster, NUMPY) for key, a in held.items() if key.startswith("residual/"))

    def test_huge_values_do_not_poison_the_state(self, spec: str):
        """After gradients near the largest float, later steps and the state are finite."""
        cluster = NUMPY.cluster(grace_ext.grace(spec), 2)
        with np.errstate(all="ignore"):
            NUMPY.step(cluster, [{"m": np.full((24, 18), 3e38, np.float32)}] * 2)
            assert all(np.isfinite(a).all() for held in states(cluster, NUMPY) for a in held.values())
            NUMPY.step(cluster, inputs.ranks(2, 1, shapes={"m": (24, 18)}))
        assert all(np.isfinite(a).all() for held in states(cluster, NUMPY) for a in held.values())

    def test_it_sends_at_most_what_it_declares(self, spec: str):
        """What really went to the collectives is at most `sends` times the payloads, headers and flags excluded."""
        g = grace_ext.grace(spec)
        cluster = NUMPY.cluster(g, 2)
        declared = sum(g.nbytes(TensorSpec(name, shape)) for name, shape in SHAPES.items())
        for step in range(3):
            with tapped() as seen:
                NUMPY.step(cluster, inputs.ranks(2, step, shapes=SHAPES))
            overhead = sum(ITEMSIZE[s.dtype] if s.kind == "allreduce" else HEADER.size for s in seen)
            assert max(cluster.wire_bytes) <= declared + overhead

    def test_state_is_what_is_declared(self, spec: str):
        """Arrays of finite floats under keys of its own; shared keys are equal on all ranks, means are means, and shifts add up to zero."""
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
    """What holds of the memory itself."""

    def test_is_a_registered_value(self, text: str):
        """Found by name, equal by its knobs, and the same after a round trip through JSON and through its string."""
        g = grace_ext.grace(f"{accepted(text)[0]} + {text}", seed=7)
        part = g.memory
        assert grace_ext.memories.get(part.name) is type(part)
        assert grace_ext.grace(json.loads(json.dumps(g.to_config()))) == g
        again = grace_ext.grace(f"{accepted(text)[0]} + {part}").memory
        assert again == part and hash(again) == hash(part)
        assert (type(part).__doc__ or "").strip().splitlines()[0].endswith(".")

    def test_refuses_by_the_right_error(self, text: str):
        """`check` says what does not fit by IncompatiblePartsError, for every compressor there is."""
        memory = grace_ext.grace(f"{accepted(text)[0]} + {text}").memory
        for name in grace_ext.compressors.names():
            try:
                memory.check(grace_ext.compressors.get(name).create())
            except IncompatiblePartsError as error:
                assert memory.name in str(error)
