"""PowerSGD, PowerSGD+ and LQ-SGD equal their equations in float64 and send the bytes they declare; a refresh keeps PowerSGD+'s promise."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.composition import making
from grace_ext.errors import IncompatiblePartsError, PayloadError, UnstableFeedbackWarning
from grace_ext.parts import rng
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS, states, tapped

from . import oracles

RUNS = pytest.mark.parametrize(
    ("world", "size"), [pytest.param(w, n, id=f"{w.name}-{n}") for w in WORLDS for n in ((1, 2, 3) if w is NUMPY else (2,))]
)
MATRIX, KERNEL, VECTOR = (24, 18), (8, 3, 5, 5), (50,)
STEPS = 7


def start(shape, r: int) -> np.ndarray:
    """Returns float64[b, r]: the first subspace of parameter 'w', which all ranks share."""
    b = int(np.prod(shape[1:]))
    key = StepInfo(step=0, rank=0, size=1, divisor=1).shared_key("w", "powersgd", 0)
    return rng.normals(key, b * r).reshape(r, b).T.astype(np.float64)


def basis_of(matrix: np.ndarray) -> np.ndarray:
    """Returns orthonormal columns that span the columns of `matrix` (left singular vectors)."""
    left, size, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, size > 1e-6 * max(size[0], 1e-300)]


class Plus:
    """Is PowerSGD, but takes the best approximation of the mean (by its SVD) at every multiple of the period; or, with gram, projects all
    gradients on the first eigenvectors of the mean of M_i^T M_i, or of M_i M_i^T if that is smaller."""

    def __init__(self, q, period, feedback, gram=False):
        self.power, self.period, self.step, self.gram = oracles.PowerSGD(q, feedback), period, 0, gram

    def __call__(self, p):
        self.step += 1
        if (self.step - 1) % self.period:
            return self.power(p)
        if self.gram:
            return self.projected(p)
        average = oracles.mean([x.reshape(x.shape[0], -1) for x in p])
        self.power.q = np.linalg.svd(average)[2][: self.power.q.shape[1]].T
        return self.power(p)

    def projected(self, p):
        matrices, r = [x.reshape(x.shape[0], -1) for x in p], self.power.q.shape[1]
        (a, b), average = matrices[0].shape, oracles.mean(matrices)
        if b <= a:
            v = np.linalg.eigh(oracles.mean([m.T @ m for m in matrices]))[1][:, ::-1][:, :r]
            project, self.power.q = (lambda m: m @ v @ v.T), v
        else:
            u = np.linalg.eigh(oracles.mean([m @ m.T for m in matrices]))[1][:, ::-1][:, :r]
            project, self.power.q = (lambda m: u @ (u.T @ m)), average.T @ u
        sent = [project(average if self.power.feedback == "mean" else m).reshape(p[0].shape) for m in matrices]
        return project(average).reshape(p[0].shape), sent


def gaussian(size: int, step: int, shape) -> list[np.ndarray]:
    """Returns matrices with well separated singular values, so that subspaces are well defined, and different noise on each rank."""
    generator = np.random.default_rng(step)
    a, b = shape[0], int(np.prod(shape[1:]))
    u, v = np.linalg.qr(generator.standard_normal((a, a)))[0], np.linalg.qr(generator.standard_normal((b, b)))[0]
    k = min(a, b)
    common = (u[:, :k] * 2.0 ** -np.arange(k)) @ v[:k] * 10
    noise = [0.02 * np.random.default_rng([step, rank]).standard_normal((a, b)) for rank in range(size)]
    return [(common + x).reshape(shape).astype(np.float32) for x in noise]


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual", "powersgd"])
@pytest.mark.parametrize("knobs", ["rank=2, refresh_period=3", "rank=2, refresh_period=2, feedback='mean'", "rank=1, refresh_period=5",
                                   "rank=2, refresh_period=3, refresh='randomized', iterations=40", "rank=2, refresh_period=1",
                                   "rank=2, refresh_period=1, refresh='gram'",
                                   "rank=2, refresh_period=3, refresh='gram', feedback='mean'"])  # fmt: skip
@pytest.mark.parametrize("shape", [MATRIX, KERNEL])
def test_powersgd_plus(world, shape, knobs, memory, size):
    """PowerSGD+ equals its equations at refreshes and between them; enough power iterations give the same subspace as the SVD."""
    g = grace_ext.grace(f"powersgd_plus({knobs}) + {memory}")
    cluster = world.cluster(g, size)
    gram = g.compressor.refresh == "gram"
    oracle = Plus(start(shape, g.compressor.rank), g.compressor.refresh_period, g.compressor.feedback, gram)
    expected = oracles.Feedback(oracle, size, on=memory != "none")
    for step in range(STEPS):
        given = gaussian(size, step, shape)
        returned = world.everywhere(cluster, [{"w": x} for x in given])
        wanted = expected.step(given)
        assert all(np.array_equal(returned[0]["w"], other["w"]) for other in returned)
        assert np.abs(returned[0]["w"] - wanted).max() <= 2e-4 * np.abs(given).max(), step
    if memory != "none":
        for rank, held in enumerate(states(cluster, world)):
            assert np.abs(held["residual/w"].reshape(shape) - expected.residuals[rank]).max() <= 5e-4 * np.abs(given).max()


def test_the_rounds_of_powersgd_plus_are_the_same_at_every_step(world):
    """Every step has two sums of the same kinds and labels, so that a traced graph fits; at a refresh the first sums the dense matrix."""
    cluster = world.cluster(grace_ext.grace("powersgd_plus(rank=2, refresh_period=3) + residual"), 2)
    (a, b), seen = MATRIX, []
    for step in range(7):
        with tapped() as wire:
            world.step(cluster, [{"w": x} for x in gaussian(2, step, MATRIX)])
        seen.append([(s.kind, s.label, s.dtype) for s in wire])
        first = a * b if step % 3 == 0 else 2 * a
        assert [s.nbytes for s in wire] == [[4 * (first + 1)] * 2, [4 * (2 * b + 1)] * 2]
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize(("shape", "side", "longer"), [(MATRIX, 18, 24), ((18, 24), 18, 24), (KERNEL, 8, 75)])
@pytest.mark.parametrize("period", [1, 3])
def test_the_rounds_of_a_gram_matrix(world, shape, side, longer, period):
    """A refresh sums one triangle of the smaller Gram matrix, and then the projections, in the rounds of every other step; what is declared
    is the mean over a period. With period 1 it is below dense, and so is rank 2 of a square matrix."""
    g = grace_ext.grace(f"powersgd_plus(rank=2, refresh_period={period}, refresh='gram') + residual")
    cluster, (a, b), total, kinds = world.cluster(g, 2), (shape[0], int(np.prod(shape[1:]))), 0, []
    for step in range(3):
        with tapped() as wire:
            world.step(cluster, [{"w": x} for x in gaussian(2, step, shape)])
        first, second = (side * (side + 1) // 2, 2 * longer) if step % period == 0 else (2 * a, 2 * b)
        assert [s.nbytes for s in wire] == [[4 * (first + 1)] * 2, [4 * (second + 1)] * 2]
        kinds.append([(s.kind, s.label, s.dtype) for s in wire])
        total += first + second
    assert all(one == kinds[0] for one in kinds)
    spec = TensorSpec("w", shape)
    assert np.isclose(g.compressor.mean_nbytes(spec), 4 * total / 3) and g.compressor.nbytes(spec) >= g.compressor.mean_nbytes(spec)
    assert g.compressor.mean_nbytes(spec) < spec.nbytes
    assert grace_ext.grace("powersgd_plus(rank=2, refresh_period=1, refresh='gram')+ none").nbytes(TensorSpec("w", (64, 64))) < 4 * 64 * 64


@pytest.mark.parametrize("refresh", ["svd", "randomized", "gram"])
def test_a_fresh_subspace_at_every_step(world, refresh):
    """refresh_period=1 compresses whatever powersgd does, although dense sums cost more than no compression: the result of the first and
    of every other step has the wanted rank, and the least error. Smaller matrices are sent dense, as by powersgd."""
    g = grace_ext.grace(f"powersgd_plus(rank=2, refresh_period=1, refresh={refresh!r}, iterations=40) + none")
    cluster = world.cluster(g, 1)
    for step in range(3):
        (m,) = gaussian(1, step, MATRIX)
        left = m - world.step(cluster, [{"w": m}])["w"].astype(np.float64)
        sizes = np.linalg.svd(m.astype(np.float64))[1]
        assert np.isclose((left**2).sum(), (sizes[2:] ** 2).sum(), rtol=1e-4)
    for shape in ((4, 4), (3, 7), (5, 5), (100, 3), (100, 2)):
        spec = TensorSpec("w", shape)
        assert g.compressor.sends_dense(spec) == grace_ext.grace("powersgd(rank=2) + none").compressor.sends_dense(spec)


@pytest.mark.parametrize("shape", [(24, 18), (18, 24)])
def test_which_subspace_a_gram_matrix_gives(world, shape):
    """If ranks differ, refresh='gram' leaves the least in their memories: at most (1 - r / min(a, b)) of the squared norm that they held.
    refresh='svd' leaves the least of the mean gradient. Neither is best at both."""
    generator, size, r = np.random.default_rng(3), 4, 2
    given = [generator.standard_normal(shape) * 3.0 ** -np.arange(shape[1]) for _ in range(size)]  # columns of very different sizes
    given = [(x + 2 * np.outer(np.ones(shape[0]), np.arange(shape[1]) == 9)).astype(np.float32) for x in given]  # one that all agree on
    left, of_mean = {}, {}
    for refresh in ("svd", "gram"):
        cluster = world.cluster(grace_ext.grace(f"powersgd_plus(rank={r}, refresh_period=1, refresh={refresh!r}) + residual"), size)
        out = world.step(cluster, [{"w": x} for x in given])["w"]
        left[refresh] = np.mean([(held["residual/w"].astype(np.float64) ** 2).sum() for held in states(cluster, world)])
        of_mean[refresh] = ((oracles.mean(given) - out.astype(np.float64)) ** 2).sum()
    assert left["gram"] < left["svd"] and of_mean["svd"] < of_mean["gram"]
    sides = [x.T @ x if shape[1] <= shape[0] else x @ x.T for x in (x.astype(np.float64) for x in given)]
    values = np.linalg.eigvalsh(oracles.mean(sides))
    assert np.isclose(left["gram"], values[:-r].sum(), rtol=1e-3)
    assert left["gram"] <= (1 - r / min(shape)) * values.sum()


@pytest.mark.parametrize("shape", [(24, 18), (18, 24)])
def test_squares_out_of_range_send_nothing(world, shape):
    """If the squares of a refresh overflow or vanish, the result is zero, and the memory and the subspace keep what they had."""
    for factor in (1e25, 1e-24):
        cluster = world.cluster(grace_ext.grace("powersgd_plus(rank=2, refresh_period=2, refresh='gram') + residual"), 2)
        given = [{"w": x * np.float32(factor)} for x in gaussian(2, 0, shape)]
        with np.errstate(all="ignore"):
            assert not world.step(cluster, given)["w"].any()
        for rank, held in enumerate(states(cluster, world)):
            assert np.array_equal(held["residual/w"].reshape(shape), given[rank]["w"])
            assert np.array_equal(held["powersgd_q/w"].reshape(2, -1), start(shape, 2).T)
        assert world.step(cluster, given)["w"].any()  # the next step is no refresh


def test_a_refresh_contracts(world):
    """At a refresh the unsent part has at most (1 - r / min(a, b)) of the mean's squared norm, whatever the subspace was before; PowerSGD
    that starts orthogonally to the gradient sends almost nothing of it."""
    spec = TensorSpec("w", MATRIX)
    q = start(MATRIX, 2)
    m = inputs.normal(0, 0, shapes={"w": MATRIX})["w"].astype(np.float64)
    m -= m @ basis_of(q) @ basis_of(q).T  # M Q = 0
    m = m.astype(np.float32)
    plain = world.step(world.cluster(grace_ext.grace("powersgd(rank=2) + none"), 1), [{"w": m}])["w"]
    assert np.linalg.norm(m - plain) > 0.9 * np.linalg.norm(m)  # P is only the rounding errors of M Q
    for knobs in ("", "refresh='randomized', "):
        g = grace_ext.grace(f"powersgd_plus({knobs}rank=2) + none")
        left = m - world.step(world.cluster(g, 1), [{"w": m}])["w"]
        assert (left**2).sum() <= (1 - 2 / min(MATRIX)) * (m**2).sum()
    best = np.linalg.svd(m.astype(np.float64))[1][2:]
    left = m - world.step(world.cluster(grace_ext.grace("powersgd_plus(rank=2) + none"), 1), [{"w": m}])["w"]
    assert np.isclose((left.astype(np.float64) ** 2).sum(), (best**2).sum(), rtol=1e-4)
    assert grace_ext.grace("powersgd_plus + none").compressor.delta(spec.size) is None  # no bound between refreshes


@pytest.mark.parametrize("text", ["powersgd", "powersgd_plus(refresh_period=2)", "powersgd_plus(refresh='randomized')",
                                  "powersgd_plus(refresh_period=1)", "powersgd_plus(refresh_period=1, refresh='gram')",
                                  "lqsgd(rank=2)"])  # fmt: skip
def test_deficient_and_zero_gradients(world, text):
    """A matrix rank below r, a zero gradient and an overflow leave no NaN, and later steps compress as before."""
    cluster = world.cluster(grace_ext.grace(f"{text} + residual"), 2)
    generator = np.random.default_rng(5)
    low = (generator.standard_normal((24, 1)) @ generator.standard_normal((1, 18))).astype(np.float32)
    slack = 0.05 if text.startswith("lqsgd") else 1e-4
    for gradient in (low, 0 * low, 2 * low, 0 * low, low):
        out = world.step(cluster, [{"w": gradient}] * 2)["w"]
        assert np.abs(out - gradient).max() <= slack * np.abs(low).max() * 3
    with np.errstate(all="ignore"):
        world.step(cluster, [{"w": np.full((24, 18), 3e38, np.float32)}] * 2)
    assert all(np.isfinite(x).all() for held in states(cluster, world) for x in held.values())


# --- LQ-SGD ------------------------------------------------------------------------------------------------------------
def coded(x: np.ndarray, bits: int, alpha: float) -> np.ndarray:
    """Returns decode(encode(x)): the nearest value that a code can stand for, on the logarithmic scale."""
    levels, scale = 2 ** (bits - 1) - 1, np.abs(x).max()
    if not scale:
        return np.zeros_like(x)
    level = np.floor(np.log(1 + alpha * np.abs(x) / scale) / np.log(1 + alpha) * levels + 0.5)
    return scale * np.sign(x) * ((1 + alpha) ** (level / levels) - 1) / alpha


def lqsgd(q: np.ndarray, bits: int, alpha: float, again: bool):
    """Returns LQ-SGD with Gram-Schmidt's P, because the codes of Q depend on the basis, not only on its span. again: whether means are
    coded once more."""
    code_mean = (lambda x: coded(x, bits, alpha)) if again else (lambda x: x)

    def oracle(p):
        nonlocal q
        matrices = [x.reshape(x.shape[0], -1) for x in p]
        average = code_mean(oracles.mean([coded(m @ q, bits, alpha) for m in matrices]))
        basis, sizes = np.linalg.qr(average)
        basis = basis * np.sign(np.diag(sizes))
        own = [coded(m.T @ basis, bits, alpha) for m in matrices]
        q = code_mean(oracles.mean(own))
        return (basis @ q.T).reshape(p[0].shape), [(basis @ x.T).reshape(p[0].shape) for x in own]

    return oracle


@RUNS
@pytest.mark.parametrize("communicator", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("memory", ["none", "residual", "powersgd"])
@pytest.mark.parametrize(("rank", "bits", "alpha"), [(1, 8, 10.0), (2, 8, 10.0), (2, 4, 100.0), (1, 2, 0.001), (2, 12, 1000.0)])
def test_lqsgd(world, rank, bits, alpha, memory, communicator, size):
    """Each step equals the oracle's from the library's own state, up to one step of the scale: in float32 a value on the border of two
    codes may get either. Most results are equal."""
    g = grace_ext.grace(f"lqsgd(rank={rank}, bits={bits}, alpha={alpha}) + {memory} @ {communicator}")
    cluster, close = world.cluster(g, size), []
    for step in range(STEPS):
        given = gaussian(size, step, MATRIX)
        held = states(cluster, world) if step else [{}] * size
        q = held[0]["lqsgd_q/w"].reshape(rank, 18).T.astype(np.float64) if step else start(MATRIX, rank)
        p = [x.astype(np.float64) + (h["residual/w"].reshape(MATRIX) if step and memory != "none" else 0) for x, h in zip(given, held)]  # noqa: B905
        wanted, sent = lqsgd(q, bits, alpha, communicator == "reduce_scatter")(p)
        got = world.step(cluster, [{"w": x} for x in given])["w"]
        worst = np.abs(got - wanted).max() / np.abs(wanted).max()
        close.append(worst <= 1e-4)
        assert worst <= 3 * (1 + alpha) ** (1 / (2 ** (bits - 1) - 1)) - 3 + 1e-4 or bits < 8, (step, worst)
        if memory != "none" and close[-1]:
            for rank_, h in enumerate(states(cluster, world)):
                assert np.abs(h["residual/w"].reshape(MATRIX) - (p[rank_] - sent[rank_])).max() <= 5e-4 * np.abs(given).max()
    assert sum(close) >= STEPS - 2, close


@pytest.mark.parametrize("communicator", ["allgather", "broadcast"])
def test_lqsgd_on_the_wire(world, communicator):
    """A matrix costs 8 r (a + b) + 64 bits and two headers; a vector travels dense, also in a gather; both communicators agree."""
    g = grace_ext.grace(f"lqsgd(rank=2) + residual @ {communicator}")
    other = world.cluster(grace_ext.grace("lqsgd(rank=2) + residual @ allgather"), 3)
    cluster = world.cluster(g, 3)
    for step in range(3):
        given = [{"w": w} for w in gaussian(3, step, MATRIX)]
        with tapped() as seen:
            out = world.step(cluster, given)
        assert [s.kind for s in seen] == [communicator] * 2
        assert cluster.wire_bytes == [2 * (24 + 18) + 8 + 2 * 24] * 3
        assert np.array_equal(out["w"], world.step(other, given)["w"])
    world.step(dense := world.cluster(g, 2), [{"v": np.ones(VECTOR, np.float32)}] * 2)
    assert dense.wire_bytes == [4 * 50 + 24] * 2


def test_lqsgd_by_reduce_scatter_keeps_no_second_residual():
    g = grace_ext.grace("lqsgd + residual @ reduce_scatter")
    assert not g.communicator.keeps_state(g.compressor)
    for knobs in ("feedback=True", "follow_rate=True"):
        with pytest.raises(IncompatiblePartsError, match="a residual of their means cannot be kept"):
            grace_ext.grace(f"lqsgd + residual @ reduce_scatter({knobs})")


def test_lqsgd_checks_what_arrives():
    """An invalid scale or a code above the largest raises PayloadError; all other codes decode."""
    compressor, spec = grace_ext.grace("lqsgd(bits=4) + none").compressor, TensorSpec("w", (5, 6))
    info = StepInfo(step=0, rank=0, size=1, divisor=1)
    state = compressor.init(NUMPY.ops, spec, info)
    x = np.random.default_rng(0).standard_normal(30).astype(np.float32)
    payload, _ = compressor.compress(NUMPY.ops, x, spec, info, state)
    assert np.isfinite(compressor.decompress(NUMPY.ops, payload, spec, info)).all()
    for place, bad in ((0, np.nan), (2, -1.0), (0, np.inf)):
        changed = list(payload)
        changed[place] = np.array([bad], "<f4").view(np.uint8)
        with pytest.raises(PayloadError, match="scale"):
            compressor.decompress(NUMPY.ops, changed, spec, info)
    for place in (1, 3):
        changed = list(payload)
        changed[place] = np.full_like(payload[place], 0xFF)
        with pytest.raises(PayloadError, match="above 14"):
            compressor.decompress(NUMPY.ops, changed, spec, info)


# --- random projection -------------------------------------------------------------------------------------------------
def random_columns(shape, r: int, step: int, seed: int = 0) -> np.ndarray:
    """Returns float64[b, r]: what all ranks draw for parameter 'w' at this step."""
    b = int(np.prod(shape[1:]))
    key = StepInfo(step=step, rank=0, size=1, divisor=1, seed=seed).shared_key("w", "random_projection")
    return rng.normals(key, b * r).reshape(r, b).T.astype(np.float64) / np.sqrt(r)


@RUNS
@pytest.mark.parametrize("communicator", ["allreduce", "allgather"])
@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("shape", [MATRIX, KERNEL])
def test_random_projection(world, shape, r, communicator, size):
    """The result is mean(M) U U^T on every rank, bit for bit; one collective carries 4 a r bytes."""
    cluster = world.cluster(grace_ext.grace(f"random_projection(rank={r}) @ {communicator}"), size)
    for step in range(3):
        given = gaussian(size, step, shape)
        with tapped() as seen:
            returned = world.everywhere(cluster, [{"w": x} for x in given])
        u, average = random_columns(shape, r, step), oracles.mean([x.astype(np.float64).reshape(shape[0], -1) for x in given])
        assert all(np.array_equal(returned[0]["w"], other["w"]) for other in returned)
        assert np.abs(returned[0]["w"] - (average @ u @ u.T).reshape(shape)).max() <= 2e-6 * np.abs(average).max() * u.shape[0]
        assert [s.kind for s in seen] == [communicator]
        assert cluster.wire_bytes == [4 * shape[0] * r + (4 if communicator == "allreduce" else 24)] * size


def test_the_random_projection_is_unbiased_with_the_variance_that_it_states():
    """Over 4,000 steps the mean is the gradient, and the mean squared error is (b + 1) / r times its squared norm, within 6 deviations."""
    g, shape, r, steps = grace_ext.grace("random_projection(rank=3)"), (6, 11), 3, 4000
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    cluster = NUMPY.cluster(g, 1)
    found = np.array([NUMPY.step(cluster, [{"w": x}])["w"] for _ in range(steps)], np.float64)
    assert (np.abs(found.mean(axis=0) - x) <= 6 * found.std(axis=0) / np.sqrt(steps)).all()
    errors = ((found - x) ** 2).sum(axis=(1, 2)) / (x.astype(np.float64) ** 2).sum()
    assert abs(errors.mean() - (shape[1] + 1) / r) <= 6 * errors.std() / np.sqrt(steps)
    assert g.compressor.omega(x.size) >= (shape[1] + 1) / r


def test_which_tensors_are_projected():
    """Vectors, and matrices with no more columns than the rank, are sent dense. Shards of rows, which have the name of the whole matrix,
    are projected by the same columns. Flat shards cannot be, so reduce_scatter is refused."""
    g = grace_ext.grace("random_projection(rank=2)")
    assert [g.compressor.sends_dense(TensorSpec("w", shape)) for shape in ((50,), (9, 2), (9, 3), (1, 3))] == [True, True, False, False]
    (m,) = gaussian(1, 0, MATRIX)
    whole, upper = (NUMPY.step(NUMPY.cluster(g, 1), [{"w": x}])["w"] for x in (m, m[:7]))
    assert np.allclose(whole[:7], upper, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    with pytest.raises(IncompatiblePartsError, match="flat shards of them; use communicator 'allreduce'"):
        grace_ext.grace("random_projection @ reduce_scatter")
    with pytest.warns(UnstableFeedbackWarning):
        making.warned.discard("random_projection(rank=2) + residual(beta=0.5) @ allreduce")
        grace_ext.grace("random_projection(rank=2) + residual(beta=0.5)")


def test_a_projection_that_overflows(world):
    """The largest floats saturate in one rank's payload. If the ranks' sum overflows, all of them skip the step."""
    cluster = world.cluster(grace_ext.grace("random_projection(rank=1)"), 2)
    with np.errstate(all="ignore"):
        out = world.everywhere(cluster, [{"w": np.full((4, 5), x, np.float32)} for x in (3e37, -3e37)])
        assert all(np.abs(o["w"]).max() < 1e33 for o in out)  # they cancel but for rounding
        out = world.everywhere(cluster, [{"w": np.full((4, 5), 3e38, np.float32)}] * 2)
    assert all(np.isnan(o["w"]).all() for o in out)


# --- sizes and GRACE's bugs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "steps", "bits"),
    [
        ("powersgd(rank=1)", 2, 0.064),
        ("lqsgd", 2, 0.016),
        ("powersgd_plus(rank=1, refresh='randomized')", 50, (0.064 * 49 + 32.032) / 50),
    ],
)
def test_bits_an_element(text, steps, bits):
    """For 1000 x 1000 elements the bits per element over a period are within 5% of the table and within 3% of mean_nbytes."""
    g, shape = grace_ext.grace(f"{text} + none"), (1000, 1000)
    cluster = NUMPY.cluster(g, 1)
    x = inputs.normal(0, 0, shapes={"w": shape})["w"]
    total = 0
    for _ in range(steps):
        NUMPY.step(cluster, [{"w": x}])
        total += cluster.wire_bytes[0]
    assert abs(8 * total / steps / 1e6 / bits - 1) < 0.05
    assert abs(g.compressor.mean_nbytes(TensorSpec("w", shape)) * steps / total - 1) < 0.03


@pytest.mark.parametrize("text", ["powersgd", "powersgd_plus", "lqsgd"])
def test_the_mean_is_a_mean(world, text):
    """GRACE's bug 2: its helper builds PowerSGD without the world size, so two ranks get twice the gradient. Here the mean is a mean."""
    low = np.outer(np.arange(1, 25), np.arange(1, 19)).astype(np.float32)
    for size in (1, 2, 5):
        out = world.step(world.cluster(grace_ext.grace(f"{text} + none"), size), [{"w": low}] * size)["w"]
        assert np.abs(out - low).max() <= 0.03 * low.max(), size


def test_rounds_are_not_dropped_in_silence():
    """GRACE's bug 3: PowerSGD over its allgather gives zero gradients. Here such a composition is rejected, with what to use instead."""
    pairs = [(text, c) for text in ("powersgd", "powersgd_plus") for c in ("allgather", "broadcast", "reduce_scatter", "sparse_allreduce")]
    for text, communicator in [*pairs, ("lqsgd", "allreduce"), ("lqsgd", "sparse_allreduce")]:
        with pytest.raises(IncompatiblePartsError, match="use communicator 'all"):
            grace_ext.grace(f"{text} + residual @ {communicator}")


PLUS = ("powersgd_plus(refresh_period=4)", "powersgd_plus(refresh_period=4, refresh='gram')")


@pytest.mark.parametrize("text", ["powersgd", *PLUS, "lqsgd"])
def test_all_ranks_have_one_subspace_and_keep_it(world, text):
    """GRACE's bug 4: every rank draws Q from its own generator, anew at each step. Here Q has the same bits on all ranks, whatever the
    global generators do, and moves towards the gradient's singular vectors from step to step."""
    cluster = world.cluster(grace_ext.grace(f"{text} + none"), 3)
    given = [{"w": x} for x in gaussian(3, 0, MATRIX)]
    errors = []
    for step in range(1, 8):
        np.random.seed(step)
        out = world.step(cluster, given)["w"]
        key = "lqsgd_q/w" if text == "lqsgd" else "powersgd_q/w"
        held = states(cluster, world)
        assert all(np.array_equal(held[0][key], other[key]) for other in held)
        errors.append(np.linalg.norm(out - oracles.mean([g["w"] for g in given])))
    assert errors[-1] <= errors[0] * 1.001
    if text == "powersgd":
        assert errors[-1] < 0.9 * errors[0]
