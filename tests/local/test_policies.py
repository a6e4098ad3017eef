"""LocalSGD with policies equals reference implementations in float64: each tensor of a drift is compressed as the policy says."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError
from grace_ext.local import LocalSGDCluster
from grace_ext.local.settings import settings_of
from grace_ext.parts.tensor import TensorSpec

from . import problem
from .problem import LR, SHAPES, in_cluster
from .test_oracles import assert_equal, distance, slow_last

TOP = "topk(ratio=0.2) + residual"


def largest(x, ratio):
    """Returns x with all but its ceil(ratio d) largest elements set to zero; ratios are known up to rounding."""
    return problem.largest(x, ratio - 1e-9 / x.size)


class ByNumber:
    """Says what is sent of a tensor by the number of the synchronization, or of a rank's message; it learns nothing."""

    def __init__(self, ratio):
        self.ratio = ratio  # (name, number) -> the ratio of top-k; 1 is dense

    def compress(self, name, number, a):
        return a if self.ratio(name, number) == 1 else largest(a, self.ratio(name, number))

    def learn(self, number, drifts, compensated, means):
        pass


def synchronous(size, steps, every, rule, outer=(1.0, 0.0)):
    """Runs synchronous Qsparse-local-SGD, piecewise. Returns the models."""
    x, u = problem.initial(), {n: 0.0 for n in SHAPES}
    y = [problem.initial() for _ in range(size)]
    m = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(size)]
    for t in range(steps):
        for i in range(size):
            g = problem.gradient(y[i], i, t)
            y[i] = {n: y[i][n] - LR * g[n] for n in SHAPES}
        if (t + 1) % every:
            continue
        number, means = t // every, {}
        drifts = [{n: x[n] - y[i][n] for n in SHAPES} for i in range(size)]
        a = [{n: m[i][n] + drifts[i][n] for n in SHAPES} for i in range(size)]
        for n in SHAPES:
            sent = [rule.compress(n, number, a[i][n]) for i in range(size)]
            for i in range(size):
                m[i][n] = a[i][n] - sent[i]
            means[n] = sum(sent) / size
            u[n] = outer[1] * u[n] + means[n]
            x[n] = x[n] - outer[0] * (means[n] + outer[1] * u[n])
        y = [{n: x[n].copy() for n in SHAPES} for _ in range(size)]
        rule.learn(number, drifts, a, means)
    return y


def asynchronous(size, ticks, who, every, rule):
    """Runs asynchronous Qsparse-local-SGD, piecewise; every rank counts its own messages. Returns the models."""
    master, x, y = problem.initial(), [problem.initial() for _ in range(size)], [problem.initial() for _ in range(size)]
    m = [{n: np.zeros(s) for n, s in SHAPES.items()} for _ in range(size)]
    made, number = [0] * size, [0] * size
    for tick in range(ticks):
        reports = []
        for i in who(tick):
            g = problem.gradient(y[i], i, made[i])
            y[i] = {n: y[i][n] - LR * g[n] for n in SHAPES}
            made[i] += 1
            reports += [i] if made[i] % every[i] == 0 else []
        for i, n in itertools.product(reports, SHAPES):
            a = m[i][n] + x[i][n] - y[i][n]
            c = rule.compress(n, number[i], a)
            m[i][n] = a - c
            master[n] = master[n] - c / size
        for i in reports:
            number[i] += 1
            x[i] = {n: w.copy() for n, w in master.items()}
            y[i] = {n: w.copy() for n, w in master.items()}
    return y


FACTOR = 0.05 ** (1 / 3)
BY_NUMBER = {
    f"by_name({{'b': none}}, default={TOP})": lambda n, t: 1 if n == "b" else 0.2,
    "by_name({'w': topk(ratio=0.1) + residual}, default=topk(ratio=0.4) + residual)": lambda n, t: 0.1 if n == "w" else 0.4,
    f"by_size(min_elements=10, large={TOP})": lambda n, t: 1 if n == "b" else 0.2,
    f"warmup(steps=2, then={TOP})": lambda n, t: 1 if t < 2 else 0.2,
    f"every(n=3, then=none, otherwise={TOP})": lambda n, t: 0.2 if t % 3 else 1,
    "ratio_warmup(steps=4, stages=2, then=topk(ratio=0.05) + residual)": lambda n, t: FACTOR ** (t // 2 + 1) if t < 4 else 0.05,
    f"by_name({{'b': every(n=2, then=none, otherwise={TOP})}}, default=warmup(steps=3, then={TOP}))": (
        lambda n, t: (0.2 if t % 2 else 1) if n == "b" else 1 if t < 3 else 0.2
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", BY_NUMBER)
@pytest.mark.parametrize("size", [1, 3])
def test_policies_that_go_by_name_size_or_number(text, size):
    """A step of a policy is a synchronization. Every composition in the policy counts: another ratio gives other models."""
    got, _ = in_cluster(text, size, 18, every=2)
    assert distance(got, synchronous(size, 18, 2, ByNumber(BY_NUMBER[text]))) < 1e-5
    assert distance(got, synchronous(size, 18, 2, ByNumber(lambda n, t: 0.2))) > 1e-3


@pytest.mark.parametrize("text", [next(iter(BY_NUMBER)), f"warmup(steps=2, then={TOP})"])
def test_an_outer_optimizer(text):
    got, _ = in_cluster(text, 2, 18, every=2, outer_lr=0.7, outer_momentum=0.9)
    assert distance(got, synchronous(2, 18, 2, ByNumber(BY_NUMBER[text]), (0.7, 0.9))) < 1e-5


@pytest.mark.parametrize("text", BY_NUMBER)
@pytest.mark.parametrize("every", [[2, 2, 2], [2, 3, 5]])
def test_asynchronous_ranks_count_their_own_messages(text, every):
    """A message is decoded by its sender's number, also if its receiver is at another one."""
    got, cluster = in_cluster(text, 3, 24, who=slow_last, every=every, asynchronous=True)
    assert distance(got, asynchronous(3, 24, slow_last, every, ByNumber(BY_NUMBER[text]))) < 1e-5
    assert len({driver.step for driver in cluster.for_models}) > 1


@pytest.mark.parametrize("text", BY_NUMBER)
def test_asynchronous_ranks_with_the_same_messages_have_the_same_bits(text):
    got, cluster = in_cluster(text, 3, 20, dtype=np.float32, who=slow_last, every=[2, 3, 2], asynchronous=True, sync=True)
    assert_equal(got, [got[0]] * 3)
    for driver in cluster.for_models:
        assert {communicator.name for _, _, communicator in driver.parts.values()} == {"allgather"}


# --- policies that learn ----------------------------------------------------------------------------------------------
class Accordion:
    """Accordion's rule on drifts."""

    def __init__(self, high, low, interval, threshold):
        self.high, self.low, self.interval, self.threshold = high, low, interval, threshold
        self.critical, self.before = dict.fromkeys(SHAPES, True), dict.fromkeys(SHAPES, 0.0)
        self.sums = {n: 0.0 for n in SHAPES}
        self.seen = []

    def compress(self, name, number, a):
        return largest(a, self.high if self.critical[name] else self.low)

    def learn(self, number, drifts, compensated, means):
        self.sums = {n: self.sums[n] + means[n] for n in SHAPES}
        if (number + 1) % self.interval:
            return
        for n in SHAPES:
            now, before = np.linalg.norm(self.sums[n]), self.before[n]
            self.critical[n] = not before or abs(before - now) >= self.threshold * before
            self.before[n], self.sums[n] = now, 0.0
        self.seen.append(dict(self.critical))


@pytest.mark.parametrize("size", [1, 3])
def test_accordion(size):
    text = "accordion(high=topk(ratio=0.4) + residual, low=topk(ratio=0.1) + residual, interval=3, threshold=0.3)"
    rule = Accordion(0.4, 0.1, 3, 0.3)
    got, cluster = in_cluster(text, size, 60, every=2)
    assert distance(got, synchronous(size, 60, 2, rule)) < 1e-5
    assert {one["w"] for one in rule.seen} == {True, False}
    assert {n: bool(s["policy:regime"][1]) for n, s in cluster.for_models[-1].state.items()} == rule.seen[-1]


def test_accordion_sees_a_fall_of_the_learning_rate_in_the_drift():
    """Drifts contain the learning rate, so that its fall is a fall of their norm."""
    text = "accordion(high=topk(ratio=0.4) + none, low=topk(ratio=0.3) + none, interval=2, threshold=0.5)"
    critical = []
    for step in range(14, 20, 2):
        _, cluster = in_cluster(text, 2, step, every=1, lr=lambda t: LR / 50 if t < 14 else LR / 5000)
        critical.append({n: bool(s["policy:regime"][1]) for n, s in cluster.for_models[0].state.items()})
    assert not any(critical[0].values()) and all(critical[1].values()) and len(critical) == 3


class LGreCo:
    """L-GreCo's rule on drifts: by brute force over all combinations, with the costs that the compositions declare."""

    def __init__(self, policy, measure):
        self.policy, self.measure, self.values = policy, measure, policy.values
        self.choice, self.window = dict.fromkeys(SHAPES, policy.uniform), []
        self.decided = []
        specs = {n: TensorSpec(n, s) for n, s in SHAPES.items()}
        self.dense = {n: [leaf.parts_for(spec)[0].name == "none" for leaf in policy.leaves] for n, spec in specs.items()}
        self.sizes = {n: [leaf.nbytes(spec) for leaf in policy.leaves] for n, spec in specs.items()}

    def compress(self, name, number, a):
        choice = self.choice[name]
        return a if self.dense[name][choice] else largest(a, self.values[choice])

    def learn(self, number, drifts, compensated, means):
        self.window = [*self.window, compensated if self.measure == "compensated" else drifts][-self.policy.window :]
        if (number + 1) % self.policy.every:
            return
        errors = {}
        for n in SHAPES:
            sums = [sum(step[rank][n] for step in self.window) for rank in range(len(drifts))]
            lost = [float(np.mean([np.linalg.norm(x - largest(x, value)) for x in sums])) for value in self.values]
            errors[n] = [0.0 if dense else e for dense, e in zip(self.dense[n], lost, strict=True)]
        budget = sum(row[self.policy.uniform] for row in errors.values())
        steps = {n: [math.ceil(e / (budget / 10_000)) if e else 0 for e in row] for n, row in errors.items()}

        def cost(numbers):
            return tuple(sum(table[n][i] for n, i in zip(SHAPES, numbers, strict=True)) for table in (self.sizes, steps))

        every = itertools.product(range(len(self.values)), repeat=len(SHAPES))
        best, uniform = min((c for c in every if cost(c)[1] <= 10_000), key=cost), (self.policy.uniform,) * len(SHAPES)
        # Rounded up, the uniform choice may be over its own errors; then it is kept all the same.
        self.choice = dict(zip(SHAPES, best if cost(best)[0] < cost(uniform)[0] else uniform, strict=True))
        self.decided.append(tuple(self.choice.values()))


@pytest.mark.parametrize("measure", ["gradient", "compensated"])
@pytest.mark.parametrize("size", [1, 3])
def test_lgreco(size, measure):
    """Each rank's errors are those of its own drifts; all ranks share the decisions, and send what these say."""
    text = f"lgreco(base={TOP}, every=4, window=2, choices=8, low=0.3, high=4, measure={measure})"
    rule = LGreCo(grace_ext.grace(text).policy, measure)
    got, cluster = in_cluster(text, size, 48, every=2)
    assert distance(got, synchronous(size, 48, 2, rule)) < 1e-5
    assert (rule.policy.uniform,) * len(SHAPES) not in rule.decided[:1]
    for driver in cluster.for_models:
        assert {n: int(s["policy:setting"][0]) for n, s in driver.state.items()} == rule.choice


def test_a_drift_that_is_not_finite_teaches_nothing():
    """All ranks go back, and neither the policy's sums nor its decisions change."""
    text = "lgreco(base=topk(ratio=0.2) + residual, every=2, window=2)"
    cluster, models = LocalSGDCluster(text, 2, every=1), [problem.initial(np.float32) for _ in range(2)]
    cluster.start(models)
    draw = np.random.default_rng(0)
    for _ in range(3):
        cluster.gradients(models)
        models = cluster.step([{n: x + draw.standard_normal(x.shape).astype(np.float32) for n, x in m.items()} for m in models])
    held = [{n: {k: a.copy() for k, a in s.items()} for n, s in d.state.items()} for d in cluster.for_models]
    bad = [{n: x.copy() for n, x in m.items()} for m in models]
    bad[1]["w"][0, 0] = np.nan
    with pytest.warns(UserWarning, match="go back to the model of step 3"):
        assert_equal(cluster.step(bad), models)
    for driver, before in zip(cluster.for_models, held, strict=True):
        assert all((driver.state[n][k] == a).all() for n, s in before.items() for k, a in s.items())


def test_resuming():
    """States of model and driver resume bit for bit, in the middle of a window and of an interval."""
    text = f"accordion(high=lgreco(base={TOP}, every=3, window=2), low=topk(ratio=0.1) + residual, interval=3)"
    straight, _ = in_cluster(text, 2, 20, dtype=np.float32, every=1)
    half, cluster = in_cluster(text, 2, 11, dtype=np.float32, every=1)

    class Resumed(LocalSGDCluster):
        def start(self, models):
            super().start(models)
            for rank in range(2):
                self.for_models[rank].load_state_dict(cluster.for_models[rank].state_dict())
                self.models[rank].load_state_dict(cluster.models[rank].state_dict())

    again = Resumed(text, 2, every=1)
    again.start(half)
    models = half
    for step in range(11, 20):
        own = [{n: g.astype(np.float32) for n, g in problem.gradient(m, rank, step).items()} for rank, m in enumerate(models)]
        given = again.gradients(own)
        models = again.step([{n: (x - LR * g[n]).astype(np.float32) for n, x in m.items()} for m, g in zip(models, given, strict=True)])
    assert_equal(models, straight)


# --- what is sent, and what is refused --------------------------------------------------------------------------------
def test_bytes_follow_the_policy():
    """Biases are sent whole, the matrix in a hundredth; nothing between synchronizations, nor by asynchronous ranks that are not due."""
    text = "by_name({'*.bias': none}, default=topk(ratio=0.01) + residual)"
    model = {"a.weight": np.zeros((300, 100), np.float32), "a.bias": np.zeros(300, np.float32)}
    sent = {}
    for asynchronous in (False, True):
        cluster, models = LocalSGDCluster(text, 2, every=3, asynchronous=asynchronous), [model, model]
        cluster.start(models)
        for step in range(3):
            cluster.gradients(models)
            models = cluster.step([{n: x + np.float32(rank + step + 1) for n, x in m.items()} for rank, m in enumerate(models)])
            sent[asynchronous, step] = cluster.wire_bytes[0]
        assert all((m["a.bias"] == models[0]["a.bias"]).all() and (m["a.bias"] == 7.5).all() for m in models)
        assert sent[asynchronous, 0] == sent[asynchronous, 1] == 0 < sent[asynchronous, 2] < 300 * 4 + 300 * 8 + 100


def test_a_policy_of_dense_specs_averages_models():
    dense, _ = in_cluster("by_size(small=none, large=none)", 3, 10, dtype=np.float32, every=2)
    plain, _ = in_cluster("none", 3, 10, dtype=np.float32, every=2)
    assert_equal(dense, plain)
    gradients, _ = in_cluster("by_size(small=none, large=none)", 3, 6, dtype=np.float32, every=1)
    plain, _ = in_cluster("none", 3, 6, dtype=np.float32, every=1)
    assert_equal(gradients, plain)


def test_patterns_that_match_nothing_are_logged(caplog):
    with caplog.at_level(logging.WARNING, "grace_ext"):
        in_cluster(f"by_name({{'*.bias': none}}, default={TOP})", 2, 2, every=1)
    assert [r.getMessage() for r in caplog.records if "matches no parameter" in r.getMessage()]


@pytest.mark.parametrize(
    ("spec", "options", "match"),
    [
        ("auto", {}, "policy 'auto' goes by the times of steps .* name a spec, or use by_name, by_size, warmup"),
        ("warmup(then=auto)", {}, "policy 'auto' goes by the times"),
        ("lgreco(error=adam)", {}, "error='adam' .* use error='norm'"),
        ("by_size(large=topk + cser)", {}, "name one composition with 'cser'"),
        ("by_size(large=signsgd + none)", {}, "has no size"),
        ("by_name({'w': efsignsgd + efsignsgd}, default=none)", {}, "multiplies with the learning rate"),
        ("ratio_warmup", {}, "memory 'dgc' is the momentum of the training"),
        ("accordion", {"asynchronous": True}, "policy 'accordion' learns .* use a policy that goes by name, size or the number"),
        ("every(n=2, otherwise=lgreco)", {"asynchronous": True}, "policy 'lgreco' learns"),
        ("by_size(large=powersgd + residual)", {"asynchronous": True}, "no common step"),
        ("by_size(large=topk + residual @ sparse_allreduce)", {"asynchronous": True}, "needs all ranks at once"),
    ],
)  # fmt: skip
def test_policies_and_parts_that_cannot_be_right_are_refused(spec, options, match):
    with pytest.raises(IncompatiblePartsError, match=match):
        settings_of(spec, **options)
