"""Tests what leaves a rank: its sensitivity to one unit, the noise's law and independence, and that nothing without noise is sent."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import warnings

import numpy as np
import pytest
from scipy import stats  # comes with dp-accounting

import grace_ext
from grace_ext import LocalCluster
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.driver.driver import Driver
from grace_ext.errors import GraceError, UnsupportedError
from grace_ext.exchange.effects import Start
from grace_ext.exchange.lockstep import LockstepTransport
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.privacy import Privacy, noise
from grace_ext.privacy.mechanism import Mechanism
from grace_ext.privacy.noise import Noise

NOISELESS = Privacy(clip=1, noise_multiplier=0)
RNG = np.random.default_rng(0)
SHAPES = {"w": (30, 20), "b": (20,), "scalar": (), "empty": (0, 3)}
INFO = StepInfo(step=0, rank=0, size=2, divisor=2)


def gradients(scale=1.0):
    return {name: (scale * np.asarray(RNG.standard_normal(shape))).astype(np.float32) for name, shape in SHAPES.items()}


def specs_of(tensors):
    return {name: TensorSpec(name, *NumpyOps().describe(tensor)) for name, tensor in tensors.items()}


def released(privacy, tensors, info=INFO):
    return Mechanism(privacy, NumpyOps()).release(tensors, specs_of(tensors), info)


def norm(tensors):
    return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in tensors.values()))


# --- sensitivity ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("support", [1.0, 0.1])
@pytest.mark.parametrize("make", [
    lambda g: g,
    lambda g: {name: x * np.float32(1e6) for name, x in g.items()},
    lambda g: {name: x * np.float32(1e30) for name, x in g.items()},
    lambda g: {name: np.full_like(x, np.nan) for name, x in g.items()},
    lambda g: {**g, "b": np.full_like(g["b"], np.inf)},
], ids=["plain", "x 1e6", "x 1e30", "NaN", "one Inf"])  # fmt: skip
def test_a_rank_contributes_clip_at_most(make, support):
    """Whatever one rank's gradient is, the sum changes by `clip` at most; also for a shared random support."""
    privacy = Privacy(clip=0.5, noise_multiplier=0, support=support)
    sent = released(privacy, make(gradients()))
    assert norm(sent) <= 0.5 * (1 + 1e-6) and all(np.isfinite(x).all() for x in sent.values())


def test_the_sum_changes_by_two_clips_at_most_if_a_rank_is_replaced():
    """On the way through LocalCluster, without noise: one rank in four is replaced by 1e6 times itself, or by NaN."""
    ranks = [gradients() for _ in range(4)]
    bad = {name: x * np.float32(1e6) for name, x in ranks[2].items()}
    outcomes = [
        LocalCluster("none", 4, privacy=NOISELESS).step([*ranks[:2], replaced, ranks[3]])
        for replaced in (ranks[2], bad, {**bad, "w": np.full_like(bad["w"], np.nan)}, {name: 0 * x for name, x in bad.items()})
    ]
    for one, other in itertools.combinations(outcomes, 2):
        assert 4 * norm({name: one[name] - other[name] for name in one}) <= 2 * (1 + 1e-5)
    assert 4 * norm({name: outcomes[0][name] - outcomes[3][name] for name in bad}) <= 1 + 1e-5  # removed
    assert norm({name: outcomes[2][name] - outcomes[3][name] for name in bad}) == 0  # NaN counts as 0


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("support", [1.0, 0.2])
def test_examples_are_clipped_one_by_one(framework, support):
    """On the way through LocalCluster, against sums in float64: of three ranks one has no example, and one has one that is not finite."""
    pytest.importorskip(framework)
    privacy = Privacy(clip=0.5, noise_multiplier=0, unit="example", sample_rate=0.1, batch=4, support=support)
    ranks = [{name: np.stack([gradients(0.3)[name] for _ in range(5)])[:count] for name in SHAPES} for count in (5, 0, 4)]
    ranks[2]["b"][1, 3] = np.nan
    cluster = LocalCluster("none", 3, framework, privacy=privacy)
    info = cluster.drivers[0].step_info()
    mean = cluster.step(ranks)
    kept = {name: cluster.drivers[0].mechanism.positions(TensorSpec(name, shape), info) for name, shape in SHAPES.items()}
    expected = {name: np.zeros(math.prod(shape)) for name, shape in SHAPES.items()}
    for rank in ranks:
        for number in range(len(rank["b"])):
            example = {name: np.zeros(math.prod(shape)) for name, shape in SHAPES.items()}
            for name, x in rank.items():
                positions = slice(None) if kept[name] is None else kept[name]
                example[name][positions] = x[number].reshape(-1)[positions]
            if np.isfinite(norm(example)):
                for name, x in example.items():
                    expected[name] += min(1, 0.5 / norm(example)) * x / 4 / 3
    for name, x in mean.items():
        np.testing.assert_allclose(np.asarray(x).reshape(-1), expected[name], rtol=1e-5, atol=1e-7)
        assert np.asarray(x).shape == SHAPES[name]


def test_per_example_gradients_must_have_examples():
    privacy = Privacy(unit="example", batch=4)
    with pytest.raises(UnsupportedError, match="one dimension more than the parameter"):
        LocalCluster("none", 1, privacy=privacy).step([{"scalar": np.float32(1)}])
    with pytest.raises(GraceError, match="different numbers of examples"):
        LocalCluster("none", 1, privacy=privacy).step([{"a": np.ones((3, 2), np.float32), "b": np.ones((2, 2), np.float32)}])
    cluster = LocalCluster("none", 1, privacy=privacy)
    cluster.step([{"a": np.ones((3, 2), np.float32)}])
    with pytest.raises(GraceError, match="shape"):
        cluster.step([{"a": np.ones((3, 4), np.float32)}])


def test_a_small_gradient_is_not_enlarged_and_the_callers_memory_stays():
    given = gradients(1e-4)
    before = copy.deepcopy(given)
    sent = released(NOISELESS, given)
    for name, x in given.items():
        np.testing.assert_array_equal(x, before[name])
        np.testing.assert_array_equal(sent[name], x)
        assert not np.shares_memory(sent[name], x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_stay(dtype):
    sent = released(Privacy(clip=1, noise_multiplier=1), {"w": np.zeros((8, 8), dtype)})
    assert sent["w"].dtype == dtype and 0.5 < sent["w"].std() < 2


# --- the noise ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_noise_is_normal_with_the_wanted_variance(dtype):
    """Chi-square tests at 1e6 draws, of the variance and of the shape in 64 equally likely cells, each at one in 10 million."""
    n = 1_000_000
    drawn = released(Privacy(clip=2, noise_multiplier=1.5), {"w": np.zeros(n, dtype)})["w"] / 3.0
    assert 1e-7 < stats.chi2(n).cdf(float(np.sum(np.square(drawn, dtype=np.float64)))) < 1 - 1e-7
    cells = np.bincount(np.searchsorted(stats.norm.ppf(np.arange(1, 64) / 64), drawn), minlength=64)
    assert stats.chisquare(cells).pvalue > 1e-7
    assert np.abs(drawn).max() > 4.3  # a sum of uniforms would end early


def test_ranks_runs_and_steps_have_noise_of_their_own_whatever_the_seed():
    """Correlations of 1e5 draws stay within 6 deviations; the same seed gives other noise, too."""
    n, zeros = 100_000, [{"w": np.zeros(100_000, np.float32)}] * 2
    draws = []
    for _ in range(2):  # runs
        drivers = [Driver(grace_ext.grace("gaussian | none", seed=7), NumpyOps(), LockstepTransport(r, 2, NumpyOps(), 1)) for r in (0, 1)]
        draws += [d.privatize(zeros[0], specs_of(zeros[0]))["w"] for d in drivers for _ in range(2)]
    table = np.corrcoef(draws) * math.sqrt(n)
    assert len(draws) == 8 and np.abs(table[~np.eye(8, dtype=bool)]).max() < 6


def test_a_forked_process_draws_other_noise():
    source = Noise()
    source.normals(1)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does not use
        child = os.fork()
    if child == 0:
        os.write(write, source.normals(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 32))
    assert len(theirs) == 4 and not np.isin(theirs, source.normals(4)).any()


def test_noise_is_never_copied_nor_saved():
    """Neither by pickle nor by copy; and a state holds the number of releases, nothing of the generator."""
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UnsupportedError, match="cannot be copied or saved"):
            take(Noise())
    cluster = LocalCluster("gaussian | none", 2)
    cluster.step([{"w": np.zeros(5, np.float32)}] * 2)
    plain = LocalCluster("none", 2)
    plain.step([{"w": np.zeros(5, np.float32)}] * 2)
    private, public = cluster.state_dict()["ranks"][0], plain.state_dict()["ranks"][0]
    assert set(private) - set(public) == {"releases"} and private["releases"] == 1
    assert private["state"] == {}  # 'none' keeps nothing


def test_a_resumed_run_does_not_replay_noise():
    cluster, again = LocalCluster("gaussian | none", 2), LocalCluster("gaussian | none", 2)
    zeros = [{"w": np.zeros(50, np.float32)}] * 2
    cluster.step(zeros)
    again.load_state_dict(cluster.state_dict())
    assert not np.isin(cluster.step(zeros)["w"], again.step(zeros)["w"]).any()


def test_trust_sum_shares_the_noise_among_the_ranks():
    """The mean of n ranks has the deviation sigma clip / n with trust='sum', and sigma clip / sqrt(n) with trust='peers'."""
    zeros = [{"w": np.zeros(100_000, np.float32)}] * 4
    for trust, expected in (("sum", 1 / 4), ("peers", 1 / 2)):
        total = LocalCluster("none", 4, privacy=Privacy(trust=trust)).step(zeros)["w"]
        assert float(total.std()) == pytest.approx(expected, rel=0.02)


# --- the support ----------------------------------------------------------------------------------------------------------
def test_the_support_is_shared_changes_and_comes_before_the_clip():
    """All ranks keep the same 10%, other ones at each step; what is kept is clipped as if it were all; noise lies on it alone."""
    sent = [[released(Privacy(clip=1, support=0.1), gradients(), StepInfo(step, rank, 2, 2))["w"] for rank in (0, 1)] for step in (0, 1)]
    kept = [[set(np.flatnonzero(x)) for x in ranks] for ranks in sent]
    assert kept[0][0] == kept[0][1] and kept[1][0] == kept[1][1] != kept[0][0] and len(kept[0][0]) == 60
    noiseless = released(Privacy(clip=1, noise_multiplier=0, support=0.1), gradients(100))
    assert norm(noiseless) == pytest.approx(1, rel=1e-5)


# --- what is sent ---------------------------------------------------------------------------------------------------------
def tapped(monkeypatch, log):
    """Copies the bytes of every collective that any rank starts."""
    exchange = Driver.exchange

    def tap(self, mine):
        inner, result = exchange(self, mine), None
        while True:
            try:
                effect = inner.send(result)
            except StopIteration as stop:
                return stop.value
            if isinstance(effect, Start):
                log.append(np.asarray(effect.collective.array).tobytes())
            result = yield effect

    monkeypatch.setattr(Driver, "exchange", tap)


TAPPED = [
    "none", "topk(ratio=0.05) + residual", "powersgd + residual", "qsgd(bits=4) + residual @ reduce_scatter", "efsignsgd + residual",
    "accordion(low=topk(ratio=0.01) + residual, high=topk(ratio=0.1) + residual, interval=1)",
    "lgreco(topk(ratio=0.05) + residual, every=2, window=1)",
]  # fmt: skip


@pytest.mark.parametrize("spec", TAPPED)
def test_what_the_transport_sees_is_a_function_of_the_private_gradients_alone(spec, monkeypatch):
    """Two runs with different raw gradients, g and 1024 g, whose clipped ones are the same bits; their noise is forced equal. Then all
    bytes are equal: messages, headers, the agreement, policies' reports. Without privacy they differ."""
    shape = (64, 64)
    raw = [[{"w": RNG.standard_normal(shape).astype(np.float32)} for _ in range(2)] for _ in range(3)]
    seen = {}
    for private in (True, False):
        for scale in (1, 1024):
            numbers = itertools.count()
            monkeypatch.setattr(noise.os, "urandom", lambda count, n=numbers: next(n).to_bytes(count, "little"))
            Driver._next_number = 0
            with monkeypatch.context() as patch:
                tapped(patch, seen.setdefault((private, scale), []))
                cluster = LocalCluster(spec, 2, privacy=Privacy(clip=1) if private else None)
                for ranks in raw:
                    cluster.step([{"w": x["w"] * np.float32(scale)} for x in ranks])
    assert seen[True, 1] == seen[True, 1024] and len(seen[True, 1]) >= 6
    assert seen[False, 1] != seen[False, 1024]


def test_a_wrapper_that_does_not_make_gradients_private_is_stopped_before_it_sends():
    """The driver takes nothing but what it has made private itself, and no step in which a parameter is missing."""
    ops = NumpyOps()
    driver = Driver(grace_ext.grace("gaussian | none"), ops, LockstepTransport(0, 1, ops, 1))
    specs = {name: TensorSpec(name, (3,), "float32") for name in "ab"}
    driver.register(specs.values())
    driver.skip_agreement()
    with pytest.raises(UnsupportedError, match="'a' was about to leave this rank without noise"):
        list(driver.put("a", np.ones(3, np.float32)))
    private = driver.privatize({"a": np.ones(3, np.float32)}, specs)
    assert (private["b"] != 0).all()  # what has no gradient has noise
    list(driver.put("a", private["a"]))
    with pytest.raises(UnsupportedError, match="'b' was about to leave"):
        list(driver.finish())
    with pytest.raises(UnsupportedError, match="'a' was about to leave"):  # what was made for one step is not for the next
        list(driver.put("a", private["a"]))


# --- the audit ------------------------------------------------------------------------------------------------------------
def advantage(spec, steps, sigma, trials=1500):
    """Returns how well an observer of the aggregates tells a rank's gradient v, of norm 1, from 0: the largest difference between true and
    false positive rates, over all thresholds of <sum of the aggregates, v>."""
    v = np.ones(16, np.float32) / 4
    scores = []
    for present in (1.0, 0.0):
        found = []
        for _ in range(trials):
            cluster = LocalCluster(spec, 1, privacy=Privacy(clip=1, noise_multiplier=sigma))
            mine = [{"w": v * np.float32(present)}]
            found.append(sum(float(cluster.step(mine)["w"] @ v) for _ in range(steps)))
        scores.append(found)
    return stats.ks_2samp(*scores).statistic


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("spec", ["none", "topk(ratio=0.25) + residual", "efsignsgd + residual"])
def test_an_observer_does_no_better_than_the_theory_allows(spec, steps, monkeypatch):
    """The bound is 2 Phi(sqrt(T) / 2) - 1; without compression the observer reaches it, so the test sees what there is to see. The key is
    fixed, so that the test cannot fail by chance."""
    numbers = itertools.count()
    monkeypatch.setattr(noise.os, "urandom", lambda count: next(numbers).to_bytes(count, "little"))
    bound = 2 * stats.norm.cdf(math.sqrt(steps) / 2) - 1
    found = advantage(spec, steps, sigma=1)
    assert found <= bound + 0.05
    assert spec != "none" or found >= bound - 0.05


def test_without_noise_the_observer_is_always_right():
    assert advantage("none", 1, sigma=0, trials=50) == 1.0
