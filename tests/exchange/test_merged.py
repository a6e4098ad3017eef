"""With kernels, small neighbouring tensors of a bucket are compressed together, with the bytes, results and states of separate ones."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext import compressors
from grace_ext.arrays import kernels
from grace_ext.arrays.compiled import host_ops
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.compressors.forms.merged import ROOM, SMALL
from grace_ext.errors import IncompatiblePartsError, PayloadError
from grace_ext.exchange import bucket
from grace_ext.exchange.merge import _merged as merged
from grace_ext.parts.ops import Feedback
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import WORLDS, same_bits, states, tapped

if not kernels.enabled():
    pytest.skip("GRACE_EXT_KERNELS=0, or no numba", allow_module_level=True)

COMPILED = next(world for world in WORLDS if world.name == "numpy")
PLAIN = next(world for world in WORLDS if world.name == "numpy-plain")
#: Odd sizes, one element, no element, a tensor that is too large to be merged, and more than fit into one merge.
SHAPES = {
    "bias": (7,), "one": (1,), "empty": (0,), "filter": (3, 5, 11), "large": (SMALL + 1,), "scale": (64,), "two": (2,), "wide": (1, 1001),
    **{f"block{i}": (SMALL,) for i in range(ROOM // SMALL)}, "last": (129,),
}  # fmt: skip
MERGED = [
    "topk(ratio=0.01)", "topk(ratio=0.3)", "topk(ratio=1.0)", "topk(values='fp16')", "threshold(threshold=0.0)",
    "threshold(threshold=0.01)", "threshold(threshold=0.03)", "threshold(threshold=0.02, values='bf16')",
    "threshold(threshold=9.0)", "randomk(ratio=0.05)", "randomk(values='fp16')", "randblock(ratio=0.1)", "efsignsgd", "onebit",
    "none", "fp16", "bf16",
]  # fmt: skip


def gradients(step: int, size: int, dtype: str = "float32") -> list[dict[str, np.ndarray]]:
    """Returns gradients with heavy tails, zeros, equal values, and a tensor of zeros."""
    found = []
    for rank in range(size):
        rng = np.random.default_rng([step, rank])
        made = {name: (rng.standard_t(3, shape) * 0.01).astype(dtype) for name, shape in SHAPES.items()}
        made["filter"][rng.random(SHAPES["filter"]) < 0.5] = 0
        made["block1"] = np.round(made["block1"], 2)
        made["scale"][:] = 0
        found.append(made)
    return found


def run(world, g, size: int, dtype: str = "float32"):
    """Makes three steps. Returns (bytes of all collectives, results and states, number of tensors that were merged)."""
    cluster, outs, together = world.cluster(g, size), [], []
    before = bucket.merge

    def counted(ops, jobs, info):
        done = before(ops, jobs, info)
        together.append(len(jobs) if done else 0)
        return done

    bucket.merge = counted
    try:
        with np.errstate(all="ignore"), tapped() as seen:
            for step in range(3):
                outs.append(world.step(cluster, gradients(step, size, dtype)))
    finally:
        bucket.merge = before
    return [one.buffers for one in seen], [*outs, *states(cluster, world)], sum(together)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("memory", ["residual(beta=0.9, gamma=0.5)", "none"])
@pytest.mark.parametrize("communicator", ["allgather", "broadcast", "allreduce"])
@pytest.mark.parametrize("text", MERGED)
def test_the_same_as_one_by_one(text, communicator, memory, size):
    try:
        g = grace_ext.grace(f"{text} + {memory} @ {communicator}")
    except IncompatiblePartsError:
        return  # payloads that cannot be summed
    wire, ours, together = run(COMPILED, g, size)
    wire0, theirs, none = run(PLAIN, g, size)
    assert wire == wire0
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    if memory == "none" and text in ("efsignsgd", "onebit"):
        assert not together  # without a residual they have no one-pass form
    else:
        # Every rank merges in every step all but the empty tensor, the large one, and tiny ones that are sent dense with no such neighbour.
        assert 3 * size * (len(SHAPES) - 5) <= together <= 3 * size * (len(SHAPES) - 2)
    assert none == 0


@pytest.mark.parametrize("text", ["topk + residual", "none", "efsignsgd + residual"])
def test_narrow_gradients(text):
    """16-bit gradients are merged with others of their dtype; float64 gradients are not merged."""
    for dtype, merges in (("float16", True), ("float64", False)):
        g = grace_ext.grace(text)
        wire, ours, together = run(COMPILED, g, 2, dtype)
        wire0, theirs, _ = run(PLAIN, g, 2, dtype)
        assert wire == wire0 and bool(together) == merges
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["topk", "threshold", "randomk", "efsignsgd", "onebit", "none"])
def test_one_that_is_not_finite_skips_the_step_everywhere(name, value):
    """The rank with the value does not merge its tensors, the other rank does; they decode each other's messages and skip the step."""
    cluster = COMPILED.cluster(grace_ext.grace(f"{name} + residual"), 2)
    cluster.step(gradients(0, 2))
    before, bad = states(cluster, COMPILED), gradients(1, 2)
    bad[1]["filter"].reshape(-1)[3] = value
    with np.errstate(all="ignore"):
        out = cluster.step(bad)
    assert np.isnan(out["filter"]).all() and np.isnan(out["bias"]).all()
    assert all(same_bits(a, b) for a, b in zip(before, states(cluster, COMPILED), strict=True))


SPECS = (TensorSpec("a", (40,)), TensorSpec("b", (3, 100)), TensorSpec("c", (9,)))
INFO = StepInfo(3, 0, 2, 2)


def one(text: str):
    g = grace_ext.grace(f"{text} + residual")
    compressor, spec = merged(g.compressor, g.communicator, SPECS)
    return g.compressor, compressor, spec


@pytest.mark.parametrize("text", ["topk(ratio=0.1)", "threshold(threshold=0.5)", "efsignsgd", "onebit"])
def test_its_plain_form(text):
    """The plain form compresses like the compiled one, and decodes to what the tensors give separately."""
    ops, (each, whole, spec) = host_ops(NumpyOps), one(text)
    x = np.random.default_rng(0).standard_normal(spec.size).astype(np.float32)
    payload, _ = whole.compress(ops, x, spec, INFO, {})
    fused = whole.fused(ops, x, Feedback(np.zeros_like(x)), spec, INFO, {})
    assert np.array_equal(payload[0], fused.payload[0])
    parts = np.split(x, np.cumsum([s.size for s in SPECS])[:-1])
    decoded = [each.decompress(ops, each.compress(ops, p, s, INFO, {})[0], s, INFO) for p, s in zip(parts, SPECS, strict=True)]
    assert np.array_equal(whole.decompress(ops, payload, spec, INFO), np.concatenate(decoded))


@pytest.mark.parametrize("text", ["topk(ratio=0.1)", "topk(ratio=0.4)", "threshold(threshold=0.5)", "threshold(threshold=1.5)", "onebit"])
def test_damage_is_found_and_named(text):
    """If bytes are damaged, decoding gives what separate tensors would give, or the same error, which names the rank and the tensor."""
    ops, (each, whole, spec) = host_ops(NumpyOps), one(text)
    rng = np.random.default_rng(1)
    x = rng.standard_normal(spec.size).astype(np.float32)
    (good,), _ = whole.compress(ops, x, spec, INFO, {})
    named = 0
    for trial in range(400):
        bad = good.copy()
        if trial % 4 or not whole.fields(spec)[0].variable:  # a fixed length has already been checked when the message was cut
            at = rng.integers(len(bad))
            bad[at : at + (trial % 4)] = rng.choice([rng.integers(256), 255])
        else:
            bad = bad[: rng.integers(len(bad))]
        outcomes = []
        for plain in (False, True):
            try:
                if plain:
                    found = [whole._apart(ops, (data,), rank) for rank, data in enumerate((good, bad))]
                    pieces = [each.combine(ops, its, s, INFO) for s, its in zip(SPECS, zip(*found, strict=True), strict=True)]
                    outcomes.append(np.concatenate(pieces).tobytes())
                else:
                    outcomes.append(whole.combine(ops, [(good,), (bad,)], spec, INFO).tobytes())
            except PayloadError as error:
                outcomes.append(str(error))
                named += "rank 1" in str(error) and any(repr(s.name) in str(error) for s in SPECS)
        assert outcomes[0] == outcomes[1]
    assert named > 20


def test_only_compressors_without_a_state_are_joined():
    """Compressors with a state, or without a one-pass form, are not merged."""
    for name in compressors.names():
        g = grace_ext.grace(f"{name} + {compressors.get(name)().natural_memory}")
        if g.compressor.keeps_state or not hasattr(g.compressor, "fused"):
            assert g.compressor.merged(SPECS) is None, name
