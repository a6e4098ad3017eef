"""Compiled kernels give the same bits as plain array code at sizes where they work in pieces, are cached on disk, and can be turned off."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import grace_ext
from grace_ext import compressors
from grace_ext.arrays import kernels
from grace_ext.arrays.compiled import LEAST, SMALL, CompiledOps, host_ops, sample_step
from grace_ext.arrays.kernels.sizes import L1_PIECE
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.arrays.quantizing import STRETCH
from grace_ext.parts.ops import Feedback
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import WORLDS, same_bits, states, tapped

COMPILED = next(world for world in WORLDS if world.name == "numpy")
PLAIN = next(world for world in WORLDS if world.name == "numpy-plain")
TORCH = next(world for world in WORLDS if world.name == "torch-host")
#: Larger than SMALL, which is sorted whole, and than a STRETCH; not multiples of block sizes.
SHAPES = {"wide": (3, STRETCH // 2 + 7), "deep": (SMALL // 16 + 1, 17), "odd": (STRETCH + 1,)}
SLOW = {"atomo", "demo", "sketch", "inceptionn", "vqsgd", "strom"}  # slow compressors whose code does not depend on the size


def gradients(step: int, size: int = 2) -> list[dict[str, np.ndarray]]:
    """Returns gradients with heavy tails, zeros and repeated values."""
    found = []
    for rank in range(size):
        rng = np.random.default_rng([step, rank])
        made = {name: (rng.standard_t(3, shape) * 0.01).astype(np.float32) for name, shape in SHAPES.items()}
        made["deep"][rng.random(SHAPES["deep"]) < 0.3] = 0
        made["odd"] = np.round(made["odd"], 2)
        found.append(made)
    return found


@pytest.mark.skipif(not kernels.enabled(), reason="GRACE_EXT_KERNELS=0, or no numba")
@pytest.mark.parametrize("memory", ["residual(beta=0.9, gamma=0.5)", "none"])
@pytest.mark.parametrize("name", [name for name in compressors.names() if name not in SLOW])
def test_the_same_as_plain_code(name, memory):
    """Wire bytes, results and state are equal over three steps."""
    g = grace_ext.grace(f"{name} + {memory}")
    runs = []
    for world in (COMPILED, PLAIN):
        cluster, outs = world.cluster(g, 2), []
        with np.errstate(all="ignore"), tapped() as seen:
            for step in range(3):
                outs.append(world.step(cluster, gradients(step)))
        runs.append(([s.buffers for s in seen], [*outs, *states(cluster, world)]))
    (wire, ours), (wire0, theirs) = runs
    if g.compressor.deterministic_bytes:
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
        assert wire == wire0
    else:
        for a, b in zip(ours, theirs, strict=True):
            assert all(np.allclose(a[key], b[key], rtol=1e-3, atol=1e-3 * np.abs(b[key]).max()) for key in b)


@pytest.mark.parametrize("where", [0, STRETCH - 1, STRETCH + 5, 3 * (STRETCH // 2 + 7) - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["topk", "threshold(threshold=1e30)", "dgc", "sidco", "efsignsgd", "onebit", "randomk", "fp16"])
def test_what_is_not_finite_is_found_wherever_it_is(name, value, where):
    """If a gradient is not finite, no state changes and all ranks get NaN."""
    cluster = COMPILED.cluster(grace_ext.grace(f"{name} + residual"), 2)
    cluster.step(gradients(0))
    before = states(cluster, COMPILED)
    bad = gradients(1)
    bad[1]["wide"].reshape(-1)[where] = value
    with np.errstate(all="ignore"):
        out = cluster.step(bad)
    assert np.isnan(out["wide"]).all()
    assert all(same_bits(a, b) for a, b in zip(before, states(cluster, COMPILED), strict=True))


@pytest.mark.parametrize("name", ["topk", "topk(ratio=0.3)", *("threshold dgc sidco randomk randblock onebit fp16 powersgd".split())])
@pytest.mark.parametrize("ranks", [1, 3])
def test_results_written_over_gradients(name, ranks):
    """If results are written over gradients, bits are the same as in separate memory. While it is compressed, a gradient's memory is
    zeroed, if the result is mostly zeros, or gets the compensated gradient."""
    g, runs = grace_ext.grace(f"{name} + residual(beta=0.9, gamma=0.5)"), []
    for in_place in (False, True):
        cluster, outs = TORCH.cluster(g, ranks), []
        for driver in cluster.drivers:
            driver._in_place = in_place
        for step in range(3):
            given = [{key: torch.from_numpy(array) for key, array in one.items()} for one in gradients(step, ranks)]
            out = cluster.step(given)
            assert in_place == all(out[key].data_ptr() == given[0][key].data_ptr() for key in out)
            outs.append({key: tensor.numpy().copy() for key, tensor in out.items()})
            for one in given if in_place else ():
                assert same_bits({key: tensor.numpy() for key, tensor in one.items()}, outs[-1])
        runs.append((outs, states(cluster, TORCH)))
    for ours, theirs in zip(*[(*outs, *kept) for outs, kept in runs], strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("where", [0, STRETCH - 1, STRETCH + 5, 3 * (STRETCH // 2 + 7) - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["topk", "threshold", "dgc", "sidco", "randomk", "powersgd"])
def test_what_is_not_finite_is_found_in_a_gradient_that_is_spent(name, value, where):
    """It is found although the gradient before it has already been overwritten by zeros or by the compensated gradient."""
    cluster = TORCH.cluster(grace_ext.grace(f"{name} + residual"), 2)
    for driver in cluster.drivers:
        driver._in_place = True
    given = [{key: torch.from_numpy(array) for key, array in one.items()} for one in gradients(0)]
    cluster.step(given)
    before = states(cluster, TORCH)
    given = [{key: torch.from_numpy(array) for key, array in one.items()} for one in gradients(1)]
    given[1]["wide"].view(-1)[where] = value
    out = cluster.step(given)
    assert torch.isnan(out["wide"]).all()
    assert all(same_bits(a, b) for a, b in zip(before, states(cluster, TORCH), strict=True))


@pytest.mark.parametrize("divisor", [1, 2, 3])
def test_adding_to_zeros(divisor):
    """add_to_zeros equals add_sparse if ranks send equal, different and no positions; other elements stay untouched."""
    if not kernels.enabled():
        pytest.skip("there are no compiled ops")
    rng, d = np.random.default_rng(divisor), 3 * L1_PIECE + 17
    places = [np.flatnonzero(rng.random(d) < share) for share in (0.02, 0.0, 0.5)] + [np.array([0, 1, L1_PIECE, d - 1])]
    places.append(places[0])
    positions, ends = np.concatenate(places), np.cumsum([len(p) for p in places])
    values = rng.standard_normal(len(positions)).astype(np.float32)
    values[:5] = -0.0
    wanted, found = np.full(d, np.nan, np.float32), np.zeros(d, np.float32)
    kernels.load().add_sparse(wanted, positions, values, ends, np.float32(divisor))
    kernels.load().add_to_zeros(found, positions, values, ends, np.float32(divisor))
    assert wanted.tobytes() == found.tobytes()


def test_arrays_that_are_used_again_are_nobody_elses():
    """Arrays are reused, but results and saved states of earlier steps do not change."""
    cluster = COMPILED.cluster(grace_ext.grace("topk(ratio=0.1) + residual"), 2)
    kept = []
    for step in range(5):
        out = cluster.step(gradients(step))
        saved = states(cluster, COMPILED)
        kept.append((out, {key: array.copy() for key, array in out.items()}, saved, [dict(s) for s in cluster.state_dict()["ranks"]]))
    for out, copies, _, _ in kept:
        assert same_bits(out, copies)
    held = [array for driver in cluster.drivers for state in driver.state.values() for array in state.values()]
    assert len({array.ctypes.data for array in held}) == len(held)


def test_only_what_was_handed_out_is_taken_back():
    """Only arrays that `empty` handed out are recycled, so that memory does not grow; a view prevents the reuse of its array."""
    if not kernels.enabled():
        pytest.skip("there are no compiled ops")
    ops = host_ops(NumpyOps)
    assert isinstance(ops, CompiledOps)
    first, foreign, viewed = ops.empty(LEAST), np.zeros(LEAST, np.float32), ops.empty(LEAST)
    address, view, spare = first.ctypes.data, viewed[3:], [first, foreign, viewed]
    del first, foreign, viewed
    ops.recycle(spare)
    again, other = ops.empty(LEAST), ops.empty(LEAST)
    assert not spare and again.ctypes.data == address
    assert other.ctypes.data not in (address, view.ctypes.data - 12)


@pytest.mark.parametrize("threshold", [0.01, 1.0, 2.5, 9.0])
@pytest.mark.parametrize("size", [1, 2047, 2049, 50_001])
def test_taking_out_above_a_threshold(size, threshold):
    """Selected and remaining elements are right, even if the output buffer is too small at first."""
    if not kernels.enabled():
        pytest.skip("there are no kernels")
    ops = host_ops(NumpyOps)
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    over, before = abs(x) >= np.float32(threshold), x.copy()
    magnitudes, least = ops.magnitudes_above(x, threshold)
    assert (magnitudes == abs(x[over])).all() and len(magnitudes) == over.sum() and least == min(magnitudes, default=np.inf)
    for residual in (None, np.ones(size, np.float32)):
        left, (positions, values) = ops.take_out(Feedback(residual, 1, 1), x, threshold)
        assert (positions == np.flatnonzero(over)).all() and (values == before[over]).all()
        assert left is x and (x == (before if residual is None else np.where(over, 0, before))).all()


def test_top_k_is_exact_however_the_sample_misleads():
    """top_k is exact even if all large values are between the sampled positions, or only at them."""
    ops, plain = host_ops(NumpyOps), NumpyOps()
    sampled = np.arange(200_000) % sample_step(200_000) == 0
    for pattern in (~sampled, sampled, np.arange(200_000) < 300, np.zeros(200_000, bool)):
        x = np.where(pattern, 5.0, 0.001).astype(np.float32) * np.random.default_rng(1).choice([-1, 1], 200_000)
        x = x.astype(np.float32)
        for k in (1, 400, 2000, 199_999):
            assert (ops.top_k(x, k) == plain.top_k(x, k)).all()
            if kernels.enabled():
                topk, left = grace_ext.grace(f"topk(ratio={k / 200_000}) + residual").compressor, x.copy()
                fused = topk.fused(ops, x, Feedback(np.zeros_like(x)), TensorSpec("x", x.shape), StepInfo(0, 0, 1, 1), {})
                left[plain.top_k(x, k)] = 0
                assert (fused.unsent == left).all()


SCRIPT = """
import hashlib, numpy as np, grace_ext
from grace_ext.arrays import kernels
digest = hashlib.sha256()
specs = "topk(ratio=0.01) + residual", "efsignsgd + residual", "qsgd(bits=4)", "threshold(threshold=2.0) + residual", "randomk + residual"
for text in (*specs, "fp16", "terngrad"):
    cluster = grace_ext.LocalCluster(grace_ext.grace(text), 2)
    for step in range(2):
        rng = np.random.default_rng(step)
        out = cluster.step([{"w": rng.standard_normal((200, 300), np.float32)} for _ in range(2)])
        digest.update(out["w"].tobytes())
print(kernels.enabled(), digest.hexdigest())
"""


WITHOUT_COMPRESSION = """
import numpy as np
from grace_ext.arrays.kernels import compile
compile.compresses = lambda: False  # as on processors without the instruction
from grace_ext.arrays.kernels import select
x = np.random.default_rng(0).standard_normal(10_001).astype(np.float32)
for threshold in (0.01, 1.0, 9.0):
    positions, values = np.empty(20_000, np.int64), np.empty(20_000, np.float32)
    found, came_to = select.collect(x, np.float32(threshold).view(np.uint32), positions, values, x[:0])
    expected = np.flatnonzero(abs(x) >= threshold)
    assert came_to == len(x) and (positions[:found] == expected).all() and (values[:found] == x[expected]).all()
print("equal")
"""


def test_selection_without_the_instruction_that_compresses(tmp_path):
    assert run(WITHOUT_COMPRESSION, GRACE_EXT_CACHE=str(tmp_path)).stdout == "equal\n"


def run(script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=True
    )


def test_compiled_once_and_off_by_a_setting(tmp_path):
    """The first process compiles and says so, the second does neither. With GRACE_EXT_KERNELS=0, results are the same."""
    first, second = (run(GRACE_EXT_CACHE=str(tmp_path), GRACE_EXT_KERNELS="1") for _ in range(2))
    off = run(GRACE_EXT_CACHE=str(tmp_path / "unused"), GRACE_EXT_KERNELS="0")
    assert off.stdout.startswith("False ") and off.stderr == "" and not (tmp_path / "unused").exists()
    if first.stdout.startswith("True "):
        assert "compiling kernels" in first.stderr and "compiled in" in first.stderr
        assert second.stderr == ""
    assert first.stdout.split()[1] == second.stdout.split()[1] == off.stdout.split()[1]


def test_ranks_that_start_together_compile_once(tmp_path):
    """If ranks start together, one compiles and the others wait for it."""
    if not kernels.enabled():
        pytest.skip("there are no kernels")
    environment = {**os.environ, "GRACE_EXT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", "from grace_ext.arrays import kernels; kernels.load()"]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert sorted("compiling kernels" in text for text in said) == [False, False, True]
    assert not any(process.returncode for process in started)
