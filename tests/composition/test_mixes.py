"""Combinations of parts that could go wrong: second residuals, sums that overflow float32, feedback of variance, one rank's checkpoint."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import grace_ext
from grace_ext.composition import making
from grace_ext.errors import (
    DoubtfulSettingWarning,
    GraceError,
    IncompatiblePartsError,
    LearningRateError,
    ParameterError,
    PayloadError,
    UnstableFeedbackWarning,
)
from grace_ext.frameworks.optimizers import rate_of
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states, tapped

SHAPES = {"v": (401,), "m": (24, 18)}  # 401 elements give shards of two lengths
ALONE = (
    "topk(ratio=0.1) + residual", "powersgd + residual", "topk(ratio=0.1) + gradient_compression", "topk(ratio=0.1) + dgc",
    "signum + none", "efsignsgd + residual @ reduce_scatter", "adaqs + none", "sidco + residual",
)  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("spec", ALONE)
def test_a_checkpoint_of_rank_0_alone_leaves_all_ranks_alike(spec, known):
    """All ranks load its shared state, and their own state starts anew; results stay the same on all ranks in every later step."""
    g = grace_ext.grace(spec)
    saved, fresh = NUMPY.cluster(g, 2), NUMPY.cluster(g, 2)
    for step in range(3):
        NUMPY.step(saved, inputs.ranks(2, step, shapes=SHAPES))
    if known:
        NUMPY.step(fresh, inputs.ranks(2, 0, shapes=SHAPES))
    state = saved.drivers[0].state_dict()
    fresh.drivers[0].load_state_dict(state)
    with pytest.warns(UserWarning, match="saved by rank 0 and is loaded on rank 1"):
        fresh.drivers[1].load_state_dict(state)
    for step in range(3, 6):
        assert same_bits(*NUMPY.everywhere(fresh, inputs.ranks(2, step, shapes=SHAPES)))


@pytest.mark.parametrize("memory", ["ef21", "ef21_sgdm", "ef_star"])
def test_memories_whose_parts_belong_together_refuse_it(memory):
    """If the ranks' estimates were not those that the mean estimate is the mean of, it would stay wrong in all later steps."""
    g = grace_ext.grace(f"topk(ratio=0.1) + {memory}")
    cluster = NUMPY.cluster(g, 2)
    NUMPY.step(cluster, inputs.ranks(2, 0, shapes=SHAPES))
    with pytest.raises(GraceError, match="belongs together"):
        cluster.drivers[1].load_state_dict(cluster.drivers[0].state_dict())


@pytest.mark.parametrize(
    "spec",
    ["topk(ratio=0.1) + residual @ reduce_scatter", "efsignsgd + residual @ reduce_scatter", "topk(ratio=0.1) + none @ sparse_allreduce"],
)
def test_a_sum_beyond_float32_is_a_skipped_step(spec):
    """If finite gradients have an infinite sum, every rank gets NaN, no state changes, and the next step is as if it had not happened."""
    cluster, huge = NUMPY.cluster(grace_ext.grace(spec), 2), [{"v": np.full(401, 3e38, np.float32)}] * 2
    NUMPY.step(cluster, inputs.ranks(2, 0, shapes={"v": (401,)}))
    held = states(cluster, NUMPY)
    with np.errstate(all="ignore"):
        assert all(np.isnan(out["v"]).all() for out in NUMPY.everywhere(cluster, huge))
    assert all(same_bits(a, b) for a, b in zip(held, states(cluster, NUMPY), strict=True))
    assert np.isfinite(NUMPY.step(cluster, inputs.ranks(2, 2, shapes={"v": (401,)}))["v"]).all()


@pytest.mark.parametrize("spec", ["qsgd(bits=2) + none", "terngrad + none", "vqsgd + none"])
def test_unbiased_compressors_over_reduce_scatter_stay_bounded(spec):
    """With the same gradient for 40 steps, results stay bounded, because there is no second residual for unbiased compressors."""
    x = inputs.normal(0, 0, shapes={"v": (2048,)})
    by_scatter, by_gather = (NUMPY.cluster(grace_ext.grace(f"{spec} @ {c}"), 2) for c in ("reduce_scatter", "allgather"))
    sizes = [[np.linalg.norm(NUMPY.step(cluster, [x, x])["v"]) for _ in range(40)] for cluster in (by_scatter, by_gather)]
    assert max(sizes[0][30:]) < 60 * max(sizes[1][30:])
    assert max(sizes[0][30:]) < 3 * max(sizes[0][:10])


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("randomk + none @ reduce_scatter", "allreduce"),
        ("qsgd + none @ reduce_scatter(feedback=True)", "without bound"),
        ("efsignsgd + efsignsgd @ reduce_scatter(follow_rate=True)", "units of the update"),
        ("efsignsgd + cser @ reduce_scatter", "two arrays"),
        ("auto(candidates=['topk + cser'])", "would choose differently"),
        ("accordion(high=topk(ratio=0.1) + cser, low=topk + cser)", "would choose differently"),
        ("by_size(small=efsignsgd + residual @ reduce_scatter, large=topk + residual @ hierarchical)", "in two levels"),
        ("every(n=2, then=efsignsgd + residual @ reduce_scatter, otherwise=efsignsgd + efsignsgd @ reduce_scatter)", "different units"),
        ("topk > demo(sign=True)", "must be a mean"),
        ("dgc(ratio=0.5) > demo(chunk=6, topk=3, index='block16')", "more bytes with 'demo'"),  # 8 values take more than 9
        ("induced(biased=demo(sign=True, values='fp32'), rest=natural)", "by themselves"),
    ],
)
def test_mixes_that_would_go_wrong_are_refused(spec, why):
    with pytest.raises(IncompatiblePartsError, match=why):
        grace_ext.grace(spec)


def test_follow_rate_needs_a_residual_to_follow():
    with pytest.raises(ParameterError, match="follow_rate"):
        grace_ext.grace("efsignsgd + dist_ef_block @ reduce_scatter(feedback=False, follow_rate=True)")


def test_feedback_of_a_high_variance_is_said_once():
    """The warning appears once; the residual indeed grows, sevenfold in 15 steps."""
    with pytest.warns(UnstableFeedbackWarning, match="diana"):
        g = grace_ext.grace("qsgd(bits=4, bucket=500) + residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grace_ext.grace("qsgd(bits=4, bucket=500) + residual")  # warned already
        grace_ext.grace("qsgd + residual")
        grace_ext.grace("natural + residual")
        grace_ext.grace("topk(ratio=0.02) > qsgd(bits=4) + residual")
    x, cluster = inputs.normal(0, 0, shapes={"v": (4000,)}), NUMPY.cluster(g, 2)
    sizes = [np.linalg.norm(NUMPY.step(cluster, [x, x])["v"]) for _ in range(16)]
    assert sizes[-1] > 7 * sizes[0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("lqsgd(bits=3, rank=2) + residual", r"^lqsgd\(rank=2, bits=3\) codes .* Use bits=4 or more"),
        ("by_size(large=lqsgd(bits=2) + residual)", r"^lqsgd\(rank=1, bits=2\) codes .* Use bits=4 or more"),
        ("powersgd_plus(refresh_period=1) + residual", r"more bytes than no compression. Use refresh='gram'"),
    ],
)
def test_a_doubtful_setting_is_said_once(spec, says, monkeypatch):
    """The warning says why and what to use instead, once; the settings that it names are composed without one."""
    monkeypatch.setattr(making, "warned", set())
    with pytest.warns(DoubtfulSettingWarning, match=says) as found:
        grace_ext.grace(spec)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grace_ext.grace(spec)
        for good in ("lqsgd(bits=4)", "powersgd_plus(refresh_period=1, refresh='gram')", "powersgd_plus(refresh_period=2)"):
            grace_ext.grace(f"{good} + residual")


def test_parameter_groups_of_different_rates():
    """A part that uses the learning rate rejects different rates per group; other parts ignore them."""
    assert rate_of([{"lr": 0.1}, {"lr": 0.1}]) == 0.1 and rate_of([{}]) is None and np.isnan(rate_of([{"lr": 0.1}, {"lr": 0.0}]))
    cluster = NUMPY.cluster(grace_ext.grace("topk(ratio=0.1) + efsignsgd"), 1)
    with pytest.raises(LearningRateError, match="different ones"):
        cluster.step(inputs.ranks(1, 0, shapes=SHAPES), lr=float("nan"))
    memory = grace_ext.memories.get("efsignsgd").create()
    assert memory.learning_rate(StepInfo(step=0, rank=0, size=1, divisor=1, lr=0.5)) == 0.5


@pytest.mark.parametrize(
    "text", ["topk(ratio=0.1)", "threshold(threshold=1.0)", "topk(ratio=0.1) > fp16", "randomk(ratio=0.1)", "fp16", "none"]
)
def test_a_peer_that_sends_nan_and_does_not_say_so(text):
    """The error names the peer, for every compressor that sends plain values."""

    head = {"threshold(threshold=1.0)": 4, "topk(ratio=0.1) > fp16": None}.get(text, 0)
    if head is None:
        g = grace_ext.grace(f"{text} + none @ allgather")
        spec = grace_ext.parts.TensorSpec("v", (401,))
        head = g.compressor.fields(spec)[0].max_bytes

    def spoil(collectives, ops):
        data = np.array(collectives[1].array)
        data[24 + head : 28 + head] = 0xFF  # NaN in float32 and in float16
        return [collectives[0], collectives[1]._replace(array=data)]

    cluster = NUMPY.cluster(grace_ext.grace(f"{text} + none @ allgather"), 2)
    with tapped(spoil), np.errstate(all="ignore"), pytest.raises(PayloadError, match="not finite|NaN or Inf") as caught:
        NUMPY.step(cluster, inputs.ranks(2, 0, shapes={"v": (401,)}))
    assert caught.value.rank == 1


def test_graces_flag_and_names():
    """In GRACE, gradient_clipping is a flag, all_to_all is our reduce_scatter, and PowerSGD's momentum belongs to the optimizer here."""
    base = {"compressor": "topk", "compress_ratio": 0.01, "memory": "dgc", "momentum": 0.9, "communicator": "allgather"}
    assert grace_ext.from_params({**base, "gradient_clipping": False}) == grace_ext.grace("topk(ratio=0.01) + dgc @ allgather")
    with pytest.raises(ParameterError, match="gradient_clipping"):
        grace_ext.from_params({**base, "gradient_clipping": True})
    g = grace_ext.from_params({"compressor": "terngrad", "memory": "none", "communicator": "all_to_all"})
    assert g.communicator.name == "reduce_scatter"
    with pytest.warns(UserWarning, match="momentum_factor"):
        grace_ext.from_params({"compressor": "powersgd", "compress_rank": 2, "memory": "powersgd", "momentum_factor": 0.9})


def test_sign_is_a_name_with_knobs_too():
    assert grace_ext.grace("topk > sign(block=64) + residual") == grace_ext.grace("topk > efsignsgd(block=64) + residual")
    assert grace_ext.grace("induced(topk(ratio=0.1) > qsgd, natural)").compressor.omega(1000) < 0.125


def test_a_flag_that_may_be_left_open_says_so():
    with pytest.raises(ParameterError, match="feedback must be True or False or None, got 3"):
        grace_ext.grace("efsignsgd + none @ reduce_scatter(feedback=3)")


@pytest.mark.parametrize("name", grace_ext.compressors.names())
def test_fewer_elements_take_no_longer_fields(name):
    """This holds for every compressor that says so: a pipeline whose selection varies needs it, and refuses what does not."""
    compressor = grace_ext.compressors.get(name).create()
    sizes = [[field.max_bytes for field in compressor.fields(TensorSpec("", (n,)))] for n in range(1, 400)]
    grows = all(a <= b for less, more in zip(sizes, sizes[1:], strict=False) for a, b in zip(less, more, strict=True))
    assert grows or not compressor.grows or compressor.selects or compressor.rounds
