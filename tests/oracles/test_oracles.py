"""LocalCluster(n) equals the equations in float64, over several steps with error feedback."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS, states

from . import oracles

SIZES = (1, 2, 3, 8)
#: The reference library at every world size, the others at 3; other tests show that they give the same bytes.
RUNS = pytest.mark.parametrize(
    ("world", "size"), [pytest.param(w, n, id=f"{w.name}-{n}") for w in WORLDS for n in (SIZES if w is NUMPY else (3,))]
)
STEPS = 4
VECTOR, MATRIX = (193,), (24, 18)

# Inputs are multiples of 1/64, so these are exact in float32, except for the division by n.
EXACT = {
    "none": lambda: oracles.averaged(lambda x: x),
    "none @ allgather": lambda: oracles.averaged(lambda x: x),
    "topk(ratio=0.1)": lambda: oracles.topk(0.1),
    "topk(ratio=0.1) @ broadcast": lambda: oracles.topk(0.1),
    "topk(ratio=0.004)": lambda: oracles.topk(0.004),
    "topk(ratio=1)": lambda: oracles.topk(1),
    "threshold(threshold=4)": lambda: oracles.threshold(4),
    "threshold(threshold=7.9)": lambda: oracles.threshold(7.9),
    "fp16": lambda: oracles.cast("float16", rounded_mean=True),
    "fp16 @ allgather": lambda: oracles.cast("float16", rounded_mean=False),
    "bf16": lambda: oracles.cast("bfloat16", rounded_mean=True),
    "bf16 @ broadcast": lambda: oracles.cast("bfloat16", rounded_mean=False),
    "signsgd": lambda: oracles.signsgd(),
    "signsgd(ties='plus')": lambda: oracles.signsgd("plus"),
}
ROUNDED = {
    "efsignsgd": lambda: oracles.efsignsgd(),
    "efsignsgd(block=50)": lambda: oracles.efsignsgd(50),
    "efsignsgd(block=1) @ broadcast": lambda: oracles.efsignsgd(1),
}


def composed(text: str, memory: str):
    compressor, _, communicator = text.partition(" @ ")
    return grace_ext.grace(compressor=compressor, memory=memory, communicator=communicator or None)


def compare(world, g, oracle, size: int, shape, *, relative: float, exact: bool = False, gradients=inputs.grid) -> None:
    """Asserts errors within `relative` of the largest value, for results and residuals; if `exact`, of each value, and exact residuals."""
    cluster = world.cluster(g, size)
    on = g.memory.name == "residual"
    knobs = {"beta": g.memory.beta, "gamma": g.memory.gamma} if on else {}
    expected = oracles.Feedback(oracle, size, on=on, **knobs)
    for step in range(STEPS):
        given = gradients(size, step, shape)
        got = world.step(cluster, [{"w": x} for x in given])["w"]
        wanted = expected.step(given)
        assert got.dtype == np.float32 and got.shape == shape
        limit = relative * np.abs(wanted) if exact else relative * np.abs(given).max()
        assert (np.abs(got - wanted) <= limit).all(), step
    if on:
        for rank, held in enumerate(states(cluster, world)):
            error = np.abs(held["residual/w"].reshape(shape) - expected.residuals[rank])
            assert error.max() <= (0 if exact else 10 * relative * np.abs(given).max()), rank


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("text", EXACT)
def test_exact_ones(world, text, memory, size):
    """Selections, casts and votes are exact up to the rounding of one division (none if n is a power of two); residuals are exact."""
    relative = 2.0**-24 if size == 3 else 0.0
    compare(world, composed(text, memory), EXACT[text](), size, VECTOR, relative=relative, exact=True)


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual", "residual(beta=0.9, gamma=0.5)"])
@pytest.mark.parametrize("text", ROUNDED)
def test_scaled_signs(world, text, memory, size):
    """Each block is scaled by its mean magnitude; the last block is shorter."""
    compare(world, composed(text, memory), ROUNDED[text](), size, VECTOR, relative=3e-6)


def test_residual_knobs(world):
    """beta multiplies the old residual and gamma the gradient, from the first step on; powers of two are exact."""
    g = grace_ext.grace("topk(ratio=0.1) + residual(beta=0.5, gamma=0.25)")
    compare(world, g, oracles.topk(0.1), 2, VECTOR, relative=0.0, exact=True)


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("feedback", ["local", "mean"])
@pytest.mark.parametrize("rank", [1, 3])
def test_powersgd(world, rank, feedback, memory, size):
    """P Q^T is the projection of the mean on the column space of (mean M) Q, with Q kept from step to step; 1-D tensors are averaged."""
    g = grace_ext.grace(f"powersgd(rank={rank}, feedback={feedback!r}) + {memory}")
    spec = TensorSpec("w", MATRIX)
    info = StepInfo(step=0, rank=0, size=size, divisor=size)
    q = np.array(world.ops.host(g.compressor.init(world.ops, spec, info)["powersgd_q"])).reshape(rank, MATRIX[1]).T
    gradients = lambda n, step, shape: [inputs.normal(r, step, shapes={"w": shape})["w"] for r in range(n)]  # noqa: E731
    compare(world, g, oracles.PowerSGD(q, feedback), size, MATRIX, relative=2e-5, gradients=gradients)
    compare(world, g, oracles.averaged(lambda x: x), size, VECTOR, relative=1e-6)


def test_powersgd_of_a_matrix_of_low_rank(world):
    """Gradients whose rank is at most the compressor's, zero ones included, are reproduced without NaN."""
    rng = np.random.default_rng(5)
    u, v = rng.standard_normal((24, 1)), rng.standard_normal((1, 18))
    low = (u @ v).astype(np.float32)
    cluster = world.cluster(grace_ext.grace("powersgd(rank=3) + residual"), 2)
    for gradient in (low, np.zeros_like(low), 2 * low, low * 0 + 1):
        out = world.step(cluster, [{"w": gradient}] * 2)["w"]
        assert np.allclose(out, gradient, atol=1e-5)
    kernel = rng.standard_normal((4, 1)) @ rng.standard_normal((1, 75))
    out = world.step(world.cluster(grace_ext.grace("powersgd(rank=2)+residual"), 1), [{"w": kernel.reshape(4, 3, 5, 5).astype(np.float32)}])
    assert np.allclose(out["w"].reshape(4, 75), kernel, atol=1e-5)


def test_topk_ties_go_to_the_lowest_positions(world):
    """Among equal magnitudes, whatever their signs, the lowest positions are sent, and exactly k of them."""
    x = np.array([1, -2, 2, -1, 2, 1, -2, 1] * 3, np.float32)
    out = world.step(world.cluster(grace_ext.grace("topk(ratio=0.25) + none"), 1), [{"w": x}])["w"]
    assert np.flatnonzero(out).tolist() == [1, 2, 4, 6, 9, 10]
    out = world.step(world.cluster(grace_ext.grace("topk(ratio=0.25) + none"), 1), [{"w": np.full(24, -3, np.float32)}])["w"]
    assert np.flatnonzero(out).tolist() == list(range(6))


@pytest.mark.parametrize("ratio,d,k", [(0.01, 100, 1), (0.01, 101, 2), (0.1, 1000, 100), (0.29, 100, 29), (1e-9, 100, 1), (1, 100, 100)])
def test_how_many_are_kept(world, ratio, d, k):
    """k = max(1, min(d, ceil(ratio d - 1e-9))): 0.29 of 100 is 29, not 30 by floating point."""
    x = np.arange(1, d + 1, dtype=np.float32)
    for name in ("topk", "randomk"):
        g = grace_ext.grace(f"{name}(ratio={ratio}) + none")
        assert np.count_nonzero(world.step(world.cluster(g, 1), [{"w": x}])["w"]) == k


@RUNS
@pytest.mark.parametrize("text", ["randomk(ratio=0.1)", "randomk(ratio=0.1) @ allgather", "randomk(ratio=0.1, scale=True)"])
def test_randomk(world, text, size):
    """All ranks share k positions, at which the result is the exact mean of gradient plus residual; the rest stays in the residual."""
    scaled = "scale" in text
    cluster = world.cluster(composed(text, "none" if scaled else "residual"), size)
    kept, residuals = 20, [np.zeros(193)] * size
    factor = 193 / kept if scaled else 1.0
    for step in range(STEPS):
        given = [np.abs(x) for x in inputs.grid(size, step, VECTOR)]  # positive, so that no mean is zero
        got = world.step(cluster, [{"w": x} for x in given])["w"].astype(np.float64)
        p = [e + g for e, g in zip(residuals, given, strict=True)]
        support = np.flatnonzero(got)
        assert support.size == kept
        assert np.allclose(got[support], factor * oracles.mean(p)[support], rtol=0 if size != 3 and not scaled else 3e-7, atol=0)
        if not scaled:
            residuals = [np.where(got != 0, 0, x) for x in p]
            for rank, held in enumerate(states(cluster, world)):
                assert np.array_equal(held["residual/w"], residuals[rank])


def test_sum_instead_of_mean(world):
    """Divisor 1 gives n times the mean, the same votes and the same residuals, because only the final result is divided."""
    for text in [*EXACT, *ROUNDED, "qsgd", "randomk(ratio=0.1)", "powersgd(rank=2)", "powersgd(rank=2, feedback='mean')"]:
        clusters = [world.cluster(composed(text, "residual"), 3) for _ in range(2)]
        for driver in clusters[1].drivers:
            driver.divisor = 1
        for step in range(3):
            given = [{"w": x} for x in inputs.grid(3, step, MATRIX)]
            average, total = (world.step(cluster, given)["w"] for cluster in clusters)
            factor = 1 if "signsgd" in text and "ef" not in text else 3
            tolerance = {"fp16": 2e-3, "bf16": 2e-2}.get(text.split()[0], 1e-4)
            assert np.allclose(total, factor * average, rtol=tolerance, atol=1e-4), text
        for a, b in zip(*(states(cluster, world) for cluster in clusters), strict=True):
            assert np.allclose(a["residual/w"], b["residual/w"], atol=1e-4), text
