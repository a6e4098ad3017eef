"""Every memory equals its equations in float64, over steps with a changing learning rate, and converges as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import sampling
from grace_ext.errors import IncompatiblePartsError, LearningRateError
from grace_ext.parts.tensor import StepInfo
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS, states

from . import oracles

RUNS = pytest.mark.parametrize(
    ("world", "size"), [pytest.param(w, n, id=f"{w.name}-{n}") for w in WORLDS for n in ((1, 2, 3) if w is NUMPY else (2,))]
)
SHAPES = {"v": (193,), "m": (24, 18)}
RATES = (0.1, 0.1, 0.05, 0.0125, 0.2, 0.2)


# --- compressors, as functions of all ranks' inputs (float64[n, ...]): (the mean, what each sent) ---------------------
def _stacked(result):
    mean, sent = result
    return mean, np.array(sent)


def topk(ratio):
    return lambda step, name: lambda p: _stacked(oracles.topk(ratio)(list(p)))


def signs(block):
    return lambda step, name: lambda p: _stacked(oracles.efsignsgd(block)(list(p)))


def dense(step, name):
    return lambda p: (p.mean(axis=0), p)


def randomk(ratio, scale):
    def at(step, name):
        def compress(p):
            d = p[0].size
            k = math.ceil(ratio * d)
            positions = sampling.sample(StepInfo(step=step, rank=0, size=len(p), divisor=len(p)).shared_key(name, "randomk"), d, k)
            sent = np.zeros((len(p), d))
            sent[:, positions] = p.reshape(len(p), d)[:, positions] * (d / k if scale else 1)
            return sent.mean(axis=0).reshape(p[0].shape), sent.reshape(p.shape)

        return compress

    return at


COMPRESSORS = {
    "topk(ratio=0.1)": topk(0.1),
    "topk(ratio=1)": dense,
    "efsignsgd(block=50)": signs(50),
    "randomk(ratio=0.1)": randomk(0.1, False),
    "randomk(ratio=0.1, scale=True)": randomk(0.1, True),
    "none": dense,
}


# --- memories: generators that are sent (gradients[n, ...], lr, compressor of the step) and yield each rank's result --
def efsignsgd(result=None, e=0.0):
    while True:
        g, lr, c = yield result
        p = e + lr * g
        mean, sent = c(p)
        e, result = p - sent, mean / lr


def powersgd(result=None, e=0.0):
    while True:
        g, lr, c = yield result
        p = g + e if g.ndim > 2 else g
        result, sent = c(p)
        e = p - sent


def dgc(m, nesterov=False, masking=True):
    def run(result=None, u=0.0, v=0.0):
        while True:
            g, lr, c = yield result
            if nesterov:
                u = m * (u + g)
                v = v + u + g
            else:
                u = m * u + g
                v = v + u
            result, sent = c(v)
            v = v - sent
            if masking and c.sparse:
                u = np.where(sent != 0, 0, u)

    return run


def gradient_compression(beta, nesterov=False):
    def run(result=None, e=0.0, m=0.0):
        while True:
            g, lr, c = yield result
            mean, sent = c(g + e)
            e = g + e - sent
            m = beta * m + mean
            result = mean + (beta * m if nesterov else m)

    return run


def update_compression(beta, nesterov=False, masking=False):
    def run(result=None, e=0.0, m=0.0):
        while True:
            g, lr, c = yield result
            m = beta * m + g
            p = g + (beta * m if nesterov else m) + e
            result, sent = c(p)
            e = p - sent
            if masking and c.sparse:
                m = np.where(sent != 0, 0, m)

    return run


def momentum_compression(beta):
    def run(result=None, e=0.0, m=0.0):
        while True:
            g, lr, c = yield result
            p = beta * m + g + e
            mean, sent = c(p)
            e, result, m = p - sent, mean - beta * m, mean

    return run


def ef21(momentum):
    def run(result=None, v=0.0, h=0.0, whole=0.0):
        while True:
            g, lr, c = yield result
            v = momentum * v + (1 - momentum) * g
            mean, sent = c(v - h)
            h, whole = h + sent, whole + mean
            assert np.allclose(h.mean(axis=0), whole)
            result = whole

    return run


def diana(alpha):
    def run(result=None, h=0.0, whole=0.0):
        while True:
            g, lr, c = yield result
            mean, sent = c(g - h)
            result = whole + mean
            h, whole = h + alpha(g[0].size, c) * sent, whole + alpha(g[0].size, c) * mean

    return run


def cser(period):
    """Returns CSER as in the paper, on models x_i with errors e_i; the result is the update of x_i divided by lr."""

    def run(result=None, x=0.0, e=0.0, step=0):
        while True:
            g, lr, c = yield result
            before = x

            def partial(v, c=c):
                mean, sent = c(v)
                return mean + (v - sent), v - sent

            moved, rest = partial(g)
            x, e = x - lr * moved, e - lr * rest
            step += 1
            if step % period == 0:
                synchronized, rest = partial(e)
                x, e = x - e + synchronized, rest
            shared = x - e
            assert np.allclose(shared, shared[0], atol=1e-9)
            result = (before - x) / lr

    return run


def dist_ef_block(mu, nesterov=False):
    def run(result=None, e=0.0, m=0.0, before=1.0):
        while True:
            g, lr, c = yield result
            m = mu * m + g
            u = g + mu * m if nesterov else m
            p = u + before / lr * e
            result, sent = c(p)
            e, before = p - sent, lr

    return run


BIASED = ("topk(ratio=0.1)", "efsignsgd(block=50)", "randomk(ratio=0.1)", "topk(ratio=1)")
PICKING = ("topk(ratio=0.1)", "randomk(ratio=0.1)", "topk(ratio=1)")
UNBIASED = ("randomk(ratio=0.1, scale=True)", "none")
MEMORIES = {
    "efsignsgd": (efsignsgd, BIASED),
    "powersgd": (powersgd, BIASED),
    "dgc": (dgc(0.9), PICKING),
    "dgc(momentum=0.5, nesterov=True)": (dgc(0.5, nesterov=True), PICKING),
    "dgc(masking=False)": (dgc(0.9, masking=False), PICKING),
    "gradient_compression": (gradient_compression(0.9), BIASED),
    "gradient_compression(momentum=0.5, nesterov=True)": (gradient_compression(0.5, True), BIASED),
    "update_compression": (update_compression(0.9), BIASED),
    "update_compression(momentum=0.5, nesterov=True)": (update_compression(0.5, True), BIASED),
    "update_compression(masking=True)": (update_compression(0.9, masking=True), PICKING),
    "momentum_compression": (momentum_compression(0.9), (*BIASED, "none")),
    "momentum_compression(momentum=0.5)": (momentum_compression(0.5), BIASED),
    "ef21": (ef21(0), BIASED),
    "ef21_sgdm(momentum=0.8)": (ef21(0.8), BIASED),
    "diana": (diana(lambda d, c: math.ceil(0.1 * d) / d if c.sparse else 1.0), UNBIASED),
    "diana(alpha=0.05)": (diana(lambda d, c: 0.05 if c.sparse else 1.0), UNBIASED),
    "cser(reset_period=1)": (cser(1), BIASED),
    "cser(reset_period=3)": (cser(3), BIASED),
    "dist_ef_block": (dist_ef_block(0), BIASED),
    "dist_ef_block(momentum=0.9)": (dist_ef_block(0.9), BIASED),
    "dist_ef_block(momentum=0.5, nesterov=True)": (dist_ef_block(0.5, True), BIASED),
}


def compressor_at(text, step, name):
    compress = COMPRESSORS[text](step, name)

    def with_kind(p):
        return compress(p)

    with_kind.sparse = COMPRESSORS[text] is not dense
    return with_kind


@RUNS
@pytest.mark.parametrize(("memory", "text"), [(m, c) for m, (_, them) in MEMORIES.items() for c in them])
def test_equals_its_equations(world, memory, text, size):
    """Every rank's result equals the equations, for a vector and a matrix, with a changing learning rate, and also for n = 1."""
    make = MEMORIES[memory][0]
    cluster = world.cluster(grace_ext.grace(f"{text} + {memory}"), size)
    runs = {name: make() for name in SHAPES}
    for run in runs.values():
        next(run)
    for step, lr in enumerate(RATES):
        given = inputs.ranks(size, step, shapes=SHAPES)
        got = world.everywhere(cluster, given, lr)
        for name, run in runs.items():
            gradients = np.array([g[name] for g in given], np.float64)
            wanted = np.broadcast_to(run.send((gradients, lr, compressor_at(text, step, name))), gradients.shape)
            limit = 2e-5 * max(1, np.abs(wanted).max())
            for rank in range(size):
                assert np.abs(got[rank][name] - wanted[rank]).max() <= limit, (name, step, rank)


# --- clipping ---------------------------------------------------------------------------------------------------------
@RUNS
@pytest.mark.parametrize("clipping", [0.5, 30.0, 1e6])
def test_dgc_clips_the_norm_of_the_whole_model(world, size, clipping):
    """If a rank's gradient, over all tensors, is longer than clipping / sqrt(n), it is rescaled to that norm: the direction stays, no
    element is clamped, no tensor is clipped by itself. GRACE's bugs 7 (its clipping fails on the result of an all-reduce) and 8 (it clamps
    elements, at a norm that almost never binds)."""
    cluster = world.cluster(grace_ext.grace(f"topk(ratio=0.1) + dgc(clipping={clipping})"), size)
    runs = {name: dgc(0.9)() for name in SHAPES}
    for run in runs.values():
        next(run)
    for step in range(3):
        given = inputs.ranks(size, step, shapes=SHAPES)
        given[0] = {name: 100 * g for name, g in given[0].items()}
        got = world.step(cluster, given)
        norms = [math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in one.values())) for one in given]
        factors = [min(1.0, clipping / math.sqrt(size) / norm) for norm in norms]
        for name, run in runs.items():
            clipped = np.array([f * g[name].astype(np.float64) for f, g in zip(factors, given, strict=True)])
            wanted = run.send((clipped, 0.1, compressor_at("topk(ratio=0.1)", step, name)))
            assert np.abs(got[name] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_clipping_puts_the_model_into_one_bucket():
    """With clipping (and only then) the model is one bucket, because the norm needs all tensors."""
    for knobs, buckets in (("", 3), ("(clipping=1)", 1)):
        g = grace_ext.grace(f"topk + dgc{knobs}")
        assert g.memory.whole_model == (buckets == 1)
        cluster = NUMPY.cluster(g, 1)
        for driver in cluster.drivers:
            driver.bucket_bytes = 100
        NUMPY.step(cluster, [{name: np.ones(30, np.float32) for name in "abc"}])
        assert len(cluster.drivers[0].buckets) == buckets


# --- the learning rate ------------------------------------------------------------------------------------------------
USES_LR = ("topk + efsignsgd", "topk + cser", "efsignsgd + dist_ef_block", "efsignsgd + residual @ reduce_scatter(follow_rate=True)")


@pytest.mark.parametrize("spec", USES_LR)
def test_without_a_learning_rate_the_error_says_how_to_give_one(spec):
    """A step without a learning rate raises LearningRateError and changes nothing: the next step, with one, is the first."""
    cluster, other = (NUMPY.cluster(grace_ext.grace(spec), 2) for _ in range(2))
    gradients = inputs.ranks(2, 0, shapes=SHAPES)
    with pytest.raises(LearningRateError, match="optimizer=.*lr="):
        cluster.step(gradients)
    assert np.array_equal(NUMPY.step(cluster, gradients)["v"], NUMPY.step(other, gradients)["v"])


TWO_WAY = "efsignsgd + dist_ef_block(momentum=0.9) @ reduce_scatter(follow_rate=True)"


@pytest.mark.parametrize("spec", [*USES_LR, TWO_WAY, "topk + cser(reset_period=1)"])
def test_a_step_with_learning_rate_zero_gives_zeros_and_leaves_the_state(world, spec):
    """Schedules may begin and end at zero: values sent then would never be applied, so nothing may count as sent."""
    cluster = world.cluster(grace_ext.grace(spec), 2)
    zeros = world.step(cluster, inputs.ranks(2, 0, shapes=SHAPES), 0.0)
    if "+ residual" not in spec:
        assert not any(x.any() for x in zeros.values())
    held = {key: x for state in states(cluster, world) for key, x in state.items()}
    assert not any(x.any() for key, x in held.items() if key.startswith("shard") or "+ residual" not in spec)
    world.step(cluster, inputs.ranks(2, 1, shapes=SHAPES), 0.1)
    before = states(cluster, world)
    zeros = world.step(cluster, inputs.ranks(2, 2, shapes=SHAPES), 0.0)
    if "+ residual" not in spec:
        assert not any(x.any() for x in zeros.values())
    for old, new in zip(before, states(cluster, world), strict=True):
        for key in old:
            assert np.array_equal(old[key], new[key]) or (key.startswith("residual/") and "+ residual" in spec), key


@pytest.mark.parametrize("lr", [1.0, 0.1, 1e-3])
def test_efsignsgd_has_the_learning_rate_from_the_first_step(world, lr):
    """GRACE's bug 5: its first update is 1 / lr times too large, its lr stays that of the construction, and its torch form sums over
    ranks. Here, with one scale per tensor, the first result is the mean of sign(g) ||g||_1 / d for any lr; the second uses the new lr."""
    cluster = world.cluster(grace_ext.grace("efsignsgd + efsignsgd"), 2)
    first, second = inputs.ranks(2, 0, shapes=SHAPES), inputs.ranks(2, 1, shapes=SHAPES)
    scaled = lambda x: np.abs(x).mean() * np.sign(x)  # noqa: E731
    wanted = sum(scaled(g["v"].astype(np.float64)) for g in first) / 2
    assert np.allclose(world.step(cluster, first, lr)["v"], wanted, rtol=1e-5)
    rest = [lr * g["v"] - lr * scaled(g["v"].astype(np.float64)) for g in first]
    wanted = sum(scaled(e + 3 * lr * g["v"]) for e, g in zip(rest, second, strict=True)) / 2 / (3 * lr)
    assert np.allclose(world.step(cluster, second, 3 * lr)["v"], wanted, rtol=1e-4)


# --- DGC --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nesterov", [False, True])
def test_dgc_of_dense_tensors_is_momentum_of_the_mean(world, nesterov):
    """With topk(ratio=1), and for a tensor too small to compress, all is sent: nothing is masked, and the result is SGD's momentum."""
    cluster = world.cluster(grace_ext.grace(f"topk(ratio=1) + dgc(nesterov={nesterov})"), 3)
    u = 0.0
    for step in range(5):
        given = inputs.ranks(3, step, shapes=SHAPES)
        mean = sum(g["m"].astype(np.float64) for g in given) / 3
        u = 0.9 * u + mean
        wanted = mean + 0.9 * u if nesterov else u
        assert np.allclose(world.step(cluster, given)["m"], wanted, atol=1e-5), step
        assert all(not held["residual/m"].any() for held in states(cluster, world))


def test_dgc_keeps_the_rounding_of_16_bit_values(world):
    """The rounding error of fp16 stays in v; it would be lost if v were set to zero at the sent positions."""
    cluster = world.cluster(grace_ext.grace("topk(ratio=0.1, values='fp16') + dgc"), 1)
    g = inputs.ranks(1, 0, shapes=SHAPES)
    out = world.step(cluster, g)["v"]
    held = states(cluster, world)[0]
    sent = out != 0
    assert np.array_equal(held["residual/v"][sent], g[0]["v"][sent] - out[sent]) and held["residual/v"][sent].any()
    assert not held["own_momentum/v"][sent].any() and held["own_momentum/v"][~sent].all()


# --- theory -----------------------------------------------------------------------------------------------------------
class Quadratics:
    """The functions f_i(x) = 1/2 (x - c_i)^T A_i (x - c_i), a different one on every rank."""

    def __init__(self, n: int, d: int = 40, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.a = generator.uniform(0.5, 1.5, (n, d))
        self.c = 10 * generator.standard_normal((n, d))
        self.best = (self.a * self.c).sum(axis=0) / self.a.sum(axis=0)

    def gradients(self, x):
        return self.a * (x - self.c)

    def error(self, x) -> float:
        return float(np.linalg.norm(x - self.best) / np.linalg.norm(self.best))

    def descend(self, spec: str, steps: int, lr: float, change=None) -> float:
        """Runs gradient descent from zero with this exchange and returns the final relative distance from the optimum."""
        n, d = self.a.shape
        cluster = NUMPY.cluster(grace_ext.grace(spec), n)
        x = np.zeros(d)
        if change is not None:
            NUMPY.step(cluster, [{"x": np.zeros(d, np.float32)}] * n)
            saved = cluster.state_dict()
            change(saved)
            cluster.load_state_dict(saved)
        for _ in range(steps):
            x = x - lr * NUMPY.step(cluster, [{"x": g.astype(np.float32)} for g in self.gradients(x)], lr)["x"]
        return self.error(x)


def test_shifts_and_differences_converge_where_the_residual_does_not():
    """On strongly convex problems that differ between ranks, with exact gradients, EF21, EF21 with momentum, EF-GDstar with the true shifts
    and DIANA reach the optimum up to rounding; error feedback and compression alone, with the same step size, do not."""
    problem = Quadratics(4)

    def shifts(saved):
        for rank, h in enumerate(problem.gradients(problem.best)):
            saved["ranks"][rank]["state"]["shift/x"] = h.astype(np.float32)

    ends = {
        "residual": problem.descend("topk(ratio=0.1) + residual", 300, 0.1),
        "none": problem.descend("topk(ratio=0.1) + none", 300, 0.1),
        "ef21": problem.descend("topk(ratio=0.1) + ef21", 300, 0.1),
        "ef21_sgdm": problem.descend("topk(ratio=0.1) + ef21_sgdm", 300, 0.05),
        "ef_star": problem.descend("topk(ratio=0.1) + ef_star", 300, 0.1, shifts),
        "ef_star without a shift": problem.descend("topk(ratio=0.1) + ef_star", 300, 0.1),
        "diana": problem.descend("qsgd(bits=2) + diana(alpha=0.1)", 300, 0.1),
        "diana's compressor alone": problem.descend("qsgd(bits=2) + none", 300, 0.1),
    }
    assert all(ends[name] < 1e-4 for name in ("ef21", "ef21_sgdm", "ef_star", "diana")), ends
    assert all(ends[name] > 1e-3 for name in ("residual", "none", "ef_star without a shift", "diana's compressor alone")), ends


@pytest.mark.parametrize("text", ["topk(ratio=0.1)", "randblock(ratio=0.1)", "efsignsgd", "powersgd(rank=1)"])
@pytest.mark.parametrize("size", [2, 3])
def test_cser_keeps_what_the_models_share(world, text, size):
    """x_i + residual_i stays the same on all ranks, through resets and changes of lr, while the x_i themselves differ."""
    g = grace_ext.grace(f"{text} + cser(reset_period=3)")
    cluster = world.cluster(g, size)
    x = np.zeros((size, 24, 18))
    for step, lr in enumerate((*RATES, 0.05)):
        gradients = inputs.ranks(size, step, shapes={"w": (24, 18)})
        for rank, out in enumerate(cluster.step(world.tensors(gradients), lr=lr)):
            x[rank] -= lr * world.array(out["w"]).astype(np.float64)
        shared = [x[rank] + held["cser_residual/w"].reshape(24, 18) for rank, held in enumerate(states(cluster, world))]
        assert all(np.allclose(one, shared[0], atol=1e-5) for one in shared)
        assert not np.allclose(x[0], x[1], atol=1e-3)


def test_cser_needs_a_wrapper_that_averages():
    """CSER raises an error in an optimizer that expects the same result on all ranks."""
    from grace_ext.driver.driver import Driver
    from grace_ext.errors import UnsupportedError

    from ..driver.hub import Native

    with pytest.raises(UnsupportedError, match="averages models"):
        Driver(grace_ext.grace("topk + cser"), NUMPY.ops, Native(0, 2))


# --- parts that do not fit together -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("signsgd + efsignsgd", "vote"), ("signum + ef21", "vote"), ("signsgd + cser", "vote"), ("signsgd + dist_ef_block", "vote"),
        ("signsgd + ef_star", "vote"), ("signsgd + update_compression", "vote"), ("threshold + ef21", "contraction.*topk"),
        ("signum + momentum_compression", "vote"),
        ("powersgd + ef21_sgdm", "contraction.*'residual'"), ("qsgd + ef21", "contraction.*'diana'"), ("topk + diana", "unbiased.*qsgd"),
        ("efsignsgd + dgc", "positions"), ("qsgd + update_compression(masking=True)", "positions"), ("powersgd + dgc", "positions"),
        ("randomk(scale=True, values='fp16') + diana", "alpha"),
    ],
)  # fmt: skip
def test_refusals(spec, match):
    """A mix that does not fit is rejected when it is composed, with the reason or what to use instead."""
    with pytest.raises(IncompatiblePartsError, match=match):
        grace_ext.grace(spec)


def test_masking_uses_what_each_rank_sent():
    """dgc with randomk, threshold, randblock and a pipeline sets momentum to zero exactly at the positions in that rank's payload."""
    for text in ("randomk(ratio=0.25)", "threshold(threshold=1)", "topk(ratio=0.25) > fp16", "randblock(ratio=0.25)"):
        cluster = NUMPY.cluster(grace_ext.grace(f"{text} + dgc"), 2)
        given = inputs.ranks(2, 0, shapes=SHAPES)
        NUMPY.step(cluster, given)
        for rank, held in enumerate(states(cluster, NUMPY)):
            kept = held["residual/v"] == given[rank]["v"]
            assert np.array_equal(held["own_momentum/v"], np.where(kept, given[rank]["v"], 0)), text
