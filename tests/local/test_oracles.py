"""LocalSGDCluster equals the reference implementations of the algorithms (problem.py)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import DisagreementError, GraceError, NamesError, ParameterError, TensorChangedError
from grace_ext.local import LocalSGDCluster, post_local

from . import problem
from .problem import LR, SHAPES, in_cluster, largest


def distance(models, expected):
    return max(np.abs(one[n] - other[n]).max() for one, other in zip(models, expected, strict=True) for n in SHAPES)


def assert_equal(models, expected):
    for one, other in zip(models, expected, strict=True):
        assert all(one[n].tobytes() == other[n].tobytes() for n in SHAPES)


TOPK = "topk(ratio=0.2) + residual"


def top(x):
    return largest(x, 0.2)


# --- synchronous ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_loss_it_is_local_sgd(size, every, momentum):
    got, _ = in_cluster("none", size, 11, every=every, momentum=momentum)
    assert distance(got, problem.qsparse(size, 11, lambda t: t % every == 0, momentum=momentum)) < 1e-12


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_compressed_with_error_feedback_on_the_drift(size, every):
    """The model is right up to float32 messages, and different without the residual."""
    got, _ = in_cluster(TOPK, size, 12, every=every)
    expected = problem.qsparse(size, 12, lambda t: t % every == 0, top)
    assert distance(got, expected) < 1e-5
    without, _ = in_cluster(TOPK.replace("residual", "none"), size, 12, every=every)
    assert distance(without, expected) > 1e-3


SCHEDULES = [
    ({"schedule": [1, 2, 6, 9]}, {1, 2, 6, 9, 13, 17}),
    ({"schedule": lambda step: step in (3, 4), "max_gap": 5}, {3, 4, 9, 14, 19}),
    ({"schedule": range(4, 30, 4)}, {4, 8, 12, 16, 20}),
]


@pytest.mark.parametrize(("options", "steps"), SCHEDULES)
def test_any_schedule(options, steps):
    got, _ = in_cluster(TOPK, 2, 20, **options)
    assert distance(got, problem.qsparse(2, 20, steps.__contains__, top)) < 1e-5


def test_one_rank_without_loss_is_plain_sgd_bit_for_bit():
    got, _ = in_cluster("none", 1, 9, dtype=np.float32, every=4, momentum=0.9)
    never, _ = in_cluster("none", 1, 9, dtype=np.float32, every=1000, momentum=0.9)
    assert_equal(got, never)


def test_every_step_without_loss_exchanges_gradients():
    """With every=1 and no loss it is plain data-parallel training, bit for bit."""
    got, cluster = in_cluster("none", 3, 8, dtype=np.float32, every=1, momentum=0.9)
    mean, model = grace_ext.LocalCluster(grace_ext.grace("none"), 3), problem.initial(np.float32)
    velocity = dict.fromkeys(SHAPES, 0.0)
    for step in range(8):
        own = [{n: g.astype(np.float32) for n, g in problem.gradient(model, rank, step).items()} for rank in range(3)]
        for n, g in mean.step(own).items():
            velocity[n] = 0.9 * velocity[n] + g
            model[n] = (model[n] - LR * velocity[n]).astype(np.float32)
    assert_equal(got, [model] * 3)
    assert cluster.wire_bytes == mean.wire_bytes


def test_lossless_and_lossy_forms_agree():
    """A lossless spec averages models, any other sends drifts; both give the same if the residual stays zero."""
    models, _ = in_cluster("none", 3, 10, every=3)
    drifts, _ = in_cluster("none + residual", 3, 10, every=3)
    assert 0 < distance(models, drifts) < 1e-12


@pytest.mark.parametrize("outer", [(0.7, 0.9), (0.5, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize("spec", ["none", "none + residual"])
def test_outer_nesterov_momentum(spec, outer):
    got, _ = in_cluster(spec, 3, 17, every=3, outer_lr=outer[0], outer_momentum=outer[1])
    assert distance(got, problem.qsparse(3, 17, lambda t: t % 3 == 0, outer=outer)) < 1e-12


def test_the_outer_step_is_torchs_nesterov():
    torch = pytest.importorskip("torch")
    got, _ = in_cluster("none", 2, 12, every=4, outer_lr=0.7, outer_momentum=0.9)
    x = {n: torch.nn.Parameter(torch.from_numpy(w.copy())) for n, w in problem.initial().items()}
    outer = torch.optim.SGD(x.values(), lr=0.7, momentum=0.9, nesterov=True)
    for start in range(0, 12, 4):
        y = [{n: p.detach().numpy().copy() for n, p in x.items()} for _ in range(2)]
        for i, t in [(i, t) for i in range(2) for t in range(start, start + 4)]:
            g = problem.gradient(y[i], i, t)
            y[i] = {n: y[i][n] - LR * g[n] for n in SHAPES}
        for n, p in x.items():
            p.grad = p.detach() - torch.from_numpy(sum(one[n] for one in y) / 2)
        outer.step()
    assert distance(got, [{n: p.detach().numpy() for n, p in x.items()}] * 2) < 1e-12


def test_post_local_averages_gradients_first():
    got, _ = in_cluster("none", 3, 11, schedule=post_local(start=4, every=3))
    assert distance(got, problem.qsparse(3, 11, lambda t: t <= 4 or t in (7, 10))) < 1e-12
    # The drift of compressed training begins when the averaging ends.
    got, cluster = in_cluster(TOPK, 2, 7, schedule=post_local(start=4, every=3))
    (first, _) = in_cluster("none", 2, 4, every=1)
    y = [{n: w.copy() for n, w in model.items()} for model in first]
    for i, t in [(i, t) for i in range(2) for t in range(4, 7)]:
        g = problem.gradient(y[i], i, t)
        y[i] = {n: y[i][n] - LR * g[n] for n in SHAPES}
    x = {n: first[0][n] - sum(top(first[0][n] - one[n]) for one in y) / 2 for n in SHAPES}
    assert distance(got, [x, x]) < 1e-6
    assert 0 < cluster.wire_bytes[0] < 4 * 68


def test_cser_keeps_what_the_models_share_and_sync_makes_them_one():
    """x_i + e_i (x_i - e_i in the paper) is the same on all ranks, while the models x_i differ."""
    got, cluster = in_cluster("randblock(ratio=0.25) + cser(reset_period=4)", 3, 10, lr=lambda t: LR / (1 + t))
    e = [driver.state for driver in cluster.for_gradients]
    shared = [{n: got[i][n] + e[i][n]["cser_residual"].reshape(SHAPES[n]) for n in SHAPES} for i in range(3)]
    assert distance(shared, [shared[0]] * 3) < 1e-5
    assert distance(got, [got[0]] * 3) > 1e-3
    mean = {n: sum(model[n] for model in got) / 3 for n in SHAPES}
    after = cluster.sync(got)
    assert distance(after, [mean] * 3) < 1e-12
    assert all(not state["cser_residual"].any() for driver in cluster.for_gradients for state in driver.state.values())


def test_local_steps_send_nothing():
    cluster = LocalSGDCluster("topk(ratio=0.1) > qsgd(bits=4) + residual", 2, every=3)
    model = {"w": np.zeros(10_000, np.float32)}
    cluster.start([model] * 2)
    sent = []
    models = [model] * 2
    for step in range(6):
        cluster.gradients(models)
        models = cluster.step([{"w": m["w"] + np.float32(rank + step)} for rank, m in enumerate(models)])
        sent.append(cluster.wire_bytes[0])
    assert [n > 0 for n in sent] == [False, False, True] * 2
    assert sent[2] < 2000


# --- asynchronous -----------------------------------------------------------------------------------------------------
def everyone(tick):
    return range(3)


def slow_last(tick):
    """Returns the ranks that step: rank 2 makes one step while the others make three."""
    return [0, 1, 2] if tick % 3 == 0 else [0, 1]


@pytest.mark.parametrize("who", [everyone, slow_last])
@pytest.mark.parametrize("every", [[1, 1, 1], [3, 3, 3], [2, 3, 5]])
def test_asynchronous(who, every):
    got, _ = in_cluster("none", 3, 24, who=who, every=every, asynchronous=True)
    assert distance(got, problem.asynchronous(3, 24, who, every)) < 1e-12
    got, _ = in_cluster(TOPK, 3, 24, who=who, every=every, asynchronous=True)
    assert distance(got, problem.asynchronous(3, 24, who, every, top)) < 1e-5


def test_asynchronous_with_one_schedule_is_synchronous():
    one, _ = in_cluster(TOPK, 3, 12, every=4, asynchronous=True)
    other, _ = in_cluster(TOPK, 3, 12, every=4)
    assert distance(one, other) < 1e-6


@pytest.mark.parametrize("spec", ["topk(ratio=0.2) > qsgd(bits=4) + residual", "randomk(ratio=0.3) + residual", "efsignsgd + residual",
                                  "global_topk(ratio=0.1) + residual", "threshold(threshold=0.3) + residual", "fp16"])  # fmt: skip
def test_ranks_that_have_had_the_same_messages_have_the_same_bits(spec):
    got, cluster = in_cluster(spec, 3, 20, dtype=np.float32, who=slow_last, every=[2, 3, 2], asynchronous=True, sync=True)
    assert_equal(got, [got[0]] * 3)
    assert distance(got, [problem.initial()] * 3) > 0.05
    log = [(entry.rank, entry.number) for entry in cluster._log]
    assert len(set(log)) == len(log) == 10 + 6 + 3 + 3  # each message once, including the final ones


def test_a_parameter_without_elements_and_several_buckets():
    cluster = LocalSGDCluster("topk(ratio=0.5) + residual", 2, every=1, asynchronous=True)
    for driver in cluster.for_models:
        driver.bucket_bytes = 16
    model = {"a": np.zeros(8, np.float32), "none": np.zeros((0, 3), np.float32), "b": np.zeros(8, np.float32)}
    cluster.start([model] * 2)
    assert len(cluster.for_models[0].buckets) == 3
    after = cluster.step([{n: w + np.arange(w.size, dtype=np.float32).reshape(w.shape) for n, w in model.items()}, model])
    assert after[0]["b"].tolist() == after[1]["b"].tolist() == [0, 0, 0, 0, 2, 2.5, 3, 3.5]
    assert after[0]["none"].shape == (0, 3)


# --- in all array libraries; state; bad input --------------------------------------------------------------------------
def test_the_same_models_in_every_array_library(world):
    def make(spec, size, **options):
        made = []

        class Wrapped(LocalSGDCluster):
            def __init__(self):
                super().__init__(spec, size, framework=world.framework, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grace_ext.arrays.libraries.ops_for_framework", lambda framework: world.ops)
            made.append(Wrapped())
        return _Converting(made[0], world)

    for spec, options in (
        ("topk(ratio=0.2) > qsgd(bits=4) + residual", {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}),
        ("none", {"every": 2}),
        (TOPK, {"every": [2, 3], "asynchronous": True, "sync": True}),
        (f"accordion(high=lgreco(base={TOPK}, every=2, window=1), low=topk(ratio=0.1) + residual, interval=2)", {"every": 1}),
        (f"every(n=2, then=none, otherwise=by_size(min_elements=10, large={TOPK}))", {"every": [2, 3], "asynchronous": True}),
    ):
        there, _ = in_cluster(spec, 2, 9, dtype=np.float32, make=make, **options)
        here, _ = in_cluster(spec, 2, 9, dtype=np.float32, **options)
        assert_equal(there, here)


class _Converting:
    """Wraps a cluster of another library's tensors, so that it takes and returns numpy arrays."""

    def __init__(self, cluster, world):
        self._cluster, self._world = cluster, world

    def start(self, models):
        self._cluster.start(self._world.tensors(models))

    def gradients(self, gradients, lr):
        return [self._world.arrays(m) for m in self._cluster.gradients(self._world.tensors(gradients), lr=lr)]

    def tick(self, models, ranks):
        return [self._world.arrays(m) for m in self._cluster.tick(self._world.tensors(models), ranks)]

    def sync(self, models):
        return [self._world.arrays(m) for m in self._cluster.sync(self._world.tensors(models))]


def test_what_the_user_gets_shares_no_memory_with_the_master_copy():
    cluster = LocalSGDCluster("none", 2, every=1, outer_lr=0.5)
    model = {"w": np.ones(4, np.float32)}
    cluster.start([model, model])
    model["w"] += 1  # the user's array
    out = cluster.step([{"w": np.zeros(4, np.float32)}] * 2)
    assert out[0]["w"].tolist() == [0.5] * 4
    out[0]["w"] += 7
    assert cluster.step([{"w": np.full(4, 0.5, np.float32)}] * 2)[0]["w"].tolist() == [0.5] * 4


@pytest.mark.parametrize("spec", ["none", "none + residual", "topk(ratio=1.0) + residual"])
def test_16_bit_parameters_have_a_master_copy_of_full_precision(spec):
    """A step of one rank moves the mean by half the resolution of float16; the steps must add up in the master copy."""
    ulp, cluster = 2.0**-11, LocalSGDCluster(spec, 2, every=2)
    models = [{"w": np.ones(300, np.float16)}] * 2
    cluster.start(models)
    for step in range(32):
        cluster.gradients(models)
        models = cluster.step([{"w": m["w"] - np.float16(ulp * (rank == 0 and step % 2 == 0))} for rank, m in enumerate(models)])
    assert models[0]["w"].dtype == np.float16 and cluster.models[0].master["w"].dtype == np.float32
    assert np.allclose(cluster.models[0].master["w"], 1 - 16 * ulp / 2, atol=1e-6)
    assert np.abs(models[0]["w"] - (1 - 16 * ulp / 2)).max() <= ulp


def test_16_bit_parameters_rest_where_nothing_is_trained():
    """Rounding to 16 bits is not a movement that error feedback sends, so parameters without training stay the same."""
    draw, cluster = np.random.default_rng(0), LocalSGDCluster("topk(ratio=0.05) + residual", 2, every=1)
    models = [{"w": draw.standard_normal(200).astype(np.float16)}] * 2
    cluster.start(models)
    for step in range(400):
        if step == 300:  # by then the residual of the training is sent
            before = models[0]["w"].copy()
        moves = 0.01 * draw.standard_normal((2, 200)) * (step < 50)
        cluster.gradients(models)
        models = cluster.step([{"w": (m["w"] - move).astype(np.float16)} for m, move in zip(models, moves, strict=True)])
    assert models[0]["w"].tobytes() == before.tobytes()


def test_cser_keeps_models_and_errors_where_one_is_not_finite():
    """cser has no earlier model that all ranks shared, and going back to the first one would lose the training."""
    cluster = LocalSGDCluster("topk(ratio=0.1) + cser(reset_period=4)", 2)
    models = [problem.initial(np.float32)] * 2
    cluster.start(models)
    for step in range(3):
        own = [{n: (w + rank + step).astype(np.float32) for n, w in m.items()} for rank, m in enumerate(models)]
        gradients = cluster.gradients(own, lr=LR)
        models = cluster.step([{n: w - LR * g[n] for n, w in m.items()} for m, g in zip(models, gradients, strict=True)])
    errors = [{n: s["cser_residual"].copy() for n, s in d.state.items()} for d in cluster.for_gradients]
    bad = [{n: w.copy() for n, w in m.items()} for m in models]
    bad[1]["b"][0] = np.inf
    with pytest.warns(UserWarning, match="not finite at step 3: no mean is taken, and every rank keeps its own model"):
        assert_equal(cluster.sync(bad), bad)
    for driver, kept in zip(cluster.for_gradients, errors, strict=True):
        assert all((driver.state[n]["cser_residual"] == kept[n]).all() and kept[n].any() for n in kept)
    assert_equal(*[[m] for m in cluster.sync(models)])  # the next sync with finite models takes the mean


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_goes_back_with_all(value):
    cluster = LocalSGDCluster(TOPK, 2, every=2)
    cluster.start([problem.initial(np.float32)] * 2)
    x, _ = problem.initial(np.float32), cluster.gradients([problem.initial(np.float32)] * 2)
    models = cluster.step([{n: w + 1 for n, w in x.items()}] * 2)
    bad = [{n: w.copy() for n, w in m.items()} for m in models]
    bad[1]["b"][0] = value
    with pytest.warns(UserWarning, match="go back to the model of step 0"):
        after = cluster.step(bad)
    assert_equal(after, [x, x])
    assert all(not s.get("residual", np.zeros(1)).any() for d in cluster.for_models for s in d.state.values())
    asynchronous = LocalSGDCluster(TOPK, 2, every=2, asynchronous=True)
    asynchronous.start([x, x])
    asynchronous.step(models)
    after = asynchronous.step(bad)
    assert all(np.isfinite(w).all() for m in after for w in m.values()) and asynchronous.wire_bytes[1] == 0 < asynchronous.wire_bytes[0]


def test_bad_models():
    cluster = LocalSGDCluster("none", 2, every=2)
    with pytest.raises(DisagreementError, match="different models"):
        cluster.start([{"w": np.zeros(2)}, {"w": np.ones(2)}])
    cluster = LocalSGDCluster("none", 2, every=1, outer_lr=0.5)
    cluster.start([{"w": np.zeros(2)}] * 2)
    with pytest.raises(ParameterError, match="2 ranks, got 1"):
        cluster.step([{"w": np.zeros(2)}])
    with pytest.raises(NamesError, match="started with"):
        cluster.step([{"v": np.zeros(2)}] * 2)
    with pytest.raises(TensorChangedError, match="master copy"):
        cluster.step([{"w": np.zeros(3)}] * 2)
    with pytest.raises(ParameterError, match="at least 1"):
        LocalSGDCluster("none", 0)
    with pytest.raises(ParameterError, match="by rank"):
        LocalSGDCluster("none", 2, every=[1, 2])
    with pytest.raises(ParameterError, match="2 entries, got 3"):
        LocalSGDCluster("none", 2, every=[1, 2, 3], asynchronous=True)


def test_model_state():
    """A model's state resumes, and one that does not fit is rejected without changes. Other tests resume in real jobs."""
    _, cluster = in_cluster("none", 2, 5, every=3, outer_lr=0.5)
    model, other = cluster.models[0], LocalSGDCluster("none", 2, every=3, outer_lr=0.5).models[0]
    saved = model.state_dict()
    saved["arrays"]["master/w"][:] += 0  # writing to the saved state must not matter: it is a copy
    other.load_state_dict(saved)
    assert (other.step, other.last) == (5, 3)
    with pytest.raises(NamesError, match="another model: b differ"):
        other.begin([grace_ext.parts.TensorSpec("w", (9, 7), "float64")], {"w": np.zeros((9, 7))})
    assert not other.begun
    with pytest.raises(GraceError, match=r"saved by LocalSGD\(every 3 steps, outer_lr=0.5"):
        LocalSGDCluster("none", 2, every=4).models[0].load_state_dict(saved)


def test_nothing_warns_in_a_usual_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_cluster(TOPK, 2, 4, every=2)
