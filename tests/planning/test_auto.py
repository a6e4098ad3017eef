"""Tests 'auto' on simulated ranks: what it chooses, when the choice applies, what it logs, and what it rejects."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import GraceError, IncompatiblePartsError, ParameterError
from grace_ext.exchange import lockstep

SPEC = "auto(steps=2, candidates=['topk(ratio=0.01) + residual', 'efsignsgd + residual'])"


def gradients(step: int) -> list[dict[str, np.ndarray]]:
    return [{"w": np.random.default_rng([step, rank]).standard_normal((300, 200)).astype("f4")} for rank in range(2)]


def slowed(rate: float):
    """Returns a patch that makes a LocalCluster's collectives take the time of their bytes at `rate` bytes per second."""
    original = lockstep.execute

    def execute(collectives, ops):
        time.sleep(max(c.nbytes for c in collectives) / rate)
        return original(collectives, ops)

    return mock.patch.object(lockstep, "execute", execute)


def test_it_measures_dense_steps_and_compresses_on_a_slow_network(caplog):
    cluster = grace_ext.LocalCluster(grace_ext.grace(SPEC), 2)
    sent = []
    with slowed(2e6):
        for step in range(4):
            given = gradients(step)
            out = cluster.step(given)
            sent.append(cluster.wire_bytes[1])
            if step < 2:
                assert np.allclose(out["w"], (given[0]["w"] + given[1]["w"]) / 2, atol=1e-6)
    assert sent[0] > 240_000 and sent[1] - sent[0] < 100 and sent[2] == sent[3] < 8_000
    told = [record.getMessage() for record in caplog.records if record.name == "grace_ext"]
    assert len(told) == 1 and told[0].startswith("auto: ") and "from the next step on; a step takes" in told[0]
    choices = {float(array[0]) for rank in cluster.state_dict()["ranks"] for key, array in rank["state"].items() if ":choice" in key}
    assert len(choices) == 1 and choices <= {1.0, 2.0}


def test_a_resumed_training_keeps_its_choice():
    g = grace_ext.grace(SPEC)
    first, second = grace_ext.LocalCluster(g, 2), grace_ext.LocalCluster(g, 2)
    with slowed(2e6):
        for step in range(2):
            first.step(gradients(step))
    second.load_state_dict(first.state_dict())
    one, other = first.step(gradients(2)), second.step(gradients(2))
    assert one["w"].tobytes() == other["w"].tobytes() and second.wire_bytes == first.wire_bytes


def test_dense_stays_where_nothing_is_gained(caplog):
    """auto takes what the plan advises, here dense: the candidate's encoding and decoding alone take longer than the exchange."""
    cluster = grace_ext.LocalCluster(grace_ext.grace("auto(steps=2, exchanges=0, candidates=['atomo(rank=4) + residual'])"), 2)
    for step in range(3):
        given = gradients(step)
        out = cluster.step(given)
    assert np.allclose(out["w"], (given[0]["w"] + given[1]["w"]) / 2, atol=1e-6)
    assert "none @ allreduce from the next step on; dense is best here" in caplog.text


def test_it_decides_after_steps_that_were_not_finite(caplog):
    """Loss scaling begins with steps that overflow: the decision waits for one that is finite."""
    cluster, told = grace_ext.LocalCluster(grace_ext.grace(SPEC), 2), []
    with slowed(2e6):
        for step in range(6):
            given = gradients(step)
            if step in (0, 1, 2):
                given[1]["w"][0, 0] = np.inf
            cluster.step(given)
            told.append(caplog.text.count("from the next step on"))
    assert told == [0, 0, 0, 1, 1, 1] and cluster.wire_bytes[1] < 8_000


def test_dense_is_what_was_measured_an_all_reduce():
    """Dense steps use an all-reduce for any communicator of the candidates: gathering whole gradients of many ranks is expensive."""
    kinds = []
    original = lockstep.execute

    def execute(collectives, ops):
        kinds.append(collectives[0].kind)
        return original(collectives, ops)

    cluster = grace_ext.LocalCluster(grace_ext.grace("auto(steps=9, candidates=['efsignsgd + residual'])"), 3)
    given = {"w": np.ones((300, 200), np.float32)}
    cluster.step([given] * 3)
    with mock.patch.object(lockstep, "execute", execute):
        cluster.step([given] * 3)
    assert kinds == ["allreduce"]


def test_gradients_of_16_bits_are_probed_as_such():
    """auto probes with gradients of the same dtype as in training: with 32-bit probes fp16 would seem to halve the bytes."""
    torch = pytest.importorskip("torch")
    cluster, sums = grace_ext.LocalCluster(grace_ext.grace("auto(steps=2, candidates=['fp16'])"), 2, framework="torch"), []
    original = lockstep.execute

    def execute(collectives, ops):
        sums.append(collectives[0].nbytes if collectives[0].kind == "allreduce" else 0)
        return original(collectives, ops)

    with mock.patch("grace_ext.planning.auto.SIZES", (64, 4096)), mock.patch.object(lockstep, "execute", execute):
        for step in range(2):
            trained = len(sums)
            cluster.step([{"w": torch.from_numpy(array["w"]).bfloat16()} for array in gradients(step)])
    assert len(sums) > trained + 10 and max(sums[trained:]) == max(sums[:trained]) == 120_002


def test_in_two_levels_dense_goes_so_too():
    spec = "auto(steps=2, exchanges=0, candidates=['atomo(rank=4) + residual @ hierarchical'])"
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 4, ranks_per_node=2)
    assert [str(leaf) for leaf in cluster.grace.leaves][0] == "none @ hierarchical"
    for step in range(3):
        given = gradients(step) + gradients(step + 10)
        out = cluster.step(given)
        assert np.allclose(out["w"], sum(g["w"] for g in given) / 4, atol=1e-6)


def test_one_rank_alone_stays_dense(caplog):
    cluster = grace_ext.LocalCluster(grace_ext.grace("auto(steps=2)"), 1)
    for step in range(3):
        cluster.step(gradients(step)[:1])
    assert "one rank alone" in caplog.text and cluster.wire_bytes[0] > 240_000


def test_written_and_read_again():
    for text in ("auto", SPEC):
        g = grace_ext.grace(text)
        assert grace_ext.grace(str(g)) == g and grace_ext.grace(g.to_config()) == g
    assert [str(leaf) for leaf in grace_ext.grace(SPEC).leaves] == [
        "none @ allreduce", "topk(ratio=0.01) + residual @ allgather", "efsignsgd + residual @ allgather",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("auto(candidates='topk')", "candidates must be a list of specs"),
        ("auto(candidates=['by_size'])", "candidates must be a list of specs"),
        ("auto(candidates=['topj'])", "did you mean 'topk'"),
        ("auto(steps=1)", "steps must be a whole number"),
        ("auto(candidates=['topk + residual', 'topk + residual @ hierarchical'])", "make all of them '@ hierarchical', or none"),
    ],
)
def test_bad_input(text, why):
    with pytest.raises(GraceError, match=why) as caught:
        grace_ext.grace(text)
    assert isinstance(caught.value, (ParameterError, IncompatiblePartsError)) or "topj" in text
