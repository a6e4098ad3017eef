"""Cases of the numpy Exchange over MPI, compared with a LocalCluster of as many ranks.  mpi_job.py SPEC...  (plain python: one rank)

Prints 'CASE name ok' for each case that holds on all ranks.
"""

from __future__ import annotations

import zlib
from unittest import mock

import numpy as np
from mpi_setup import (
    ARGUMENTS,
    RANK,
    SHAPES,
    SIZE,
    TOPK,
    WORLD,
    Ranks,
    assert_close,
    everyones,
    exchange,
    gradients,
)

import grace_ext
from grace_ext.errors import UnsupportedError
from grace_ext.exchange.effects import Collective

from cases import assert_same, raises, run_cases  # isort: skip


def compare(spec, bucket_bytes=None, steps=3):
    """Compares an Exchange with a LocalCluster, which only one rank computes, chosen by the spec."""
    got, bytes_sent = [], []
    with exchange(spec) as ours:
        if bucket_bytes:
            ours._driver.bucket_bytes = bucket_bytes
        for step in range(steps):
            got.append(ours.step(gradients(RANK, step), lr=0.1))
            bytes_sent.append(ours.wire_bytes)
    assert list(got[0]) == list(SHAPES)
    digests = WORLD.allgather([zlib.crc32(x.tobytes()) for out in got for x in out.values()])
    assert all(digest == digests[0] for digest in digests), f"{spec}: ranks have different results"
    if zlib.crc32(spec.encode()) % SIZE != RANK:
        return
    g = grace_ext.grace(spec)
    cluster = grace_ext.LocalCluster(g, SIZE)
    for driver in cluster.drivers if bucket_bytes else ():
        driver.bucket_bytes = bucket_bytes
    for step in range(steps):
        expected = cluster.step(everyones(step), lr=0.1)
        if "allreduce" not in g.communicator.name:  # these sum in MPI's own order
            assert_same(got[step], expected)
        try:
            assert_close(got[step], expected, 1e-6)
        except AssertionError as error:
            raise AssertionError(f"{spec}, step {step}: {error}") from None
        if g.communicator.name == "allgather" and not any(f.variable for f in g.compressor.fields(grace_ext.parts.TensorSpec("x", (99,)))):
            assert bytes_sent[step] == cluster.wire_bytes[RANK], spec


def case_equals_local_cluster():
    for spec in ARGUMENTS:
        compare(spec)


def case_many_buckets():
    for spec in (TOPK, "none", "fp16", "powersgd(rank=2) + residual", "threshold(threshold=0.5) + residual"):
        compare(spec, bucket_bytes=3000)


def case_halves_are_summed_in_float32():
    with exchange("none") as ours:
        # In float16, 2048 + 1 is 2048 at every addition, and 4 x 60000 overflows.
        x = np.array([2048 if RANK == 0 else 1, 60000], np.float16)
        total = 2048 + SIZE - 1
        assert ours.step({"x": x})["x"].tolist() == [float(np.float16(total / SIZE)), float(np.float16(60000))]
    with exchange("fp16", op="sum") as ours:
        assert ours.step({"x": np.array([2048 if RANK == 0 else 1], np.float32)})["x"].tolist() == [float(np.float16(total))]


def case_sum():
    for spec in ("none", TOPK, "fp16"):
        with exchange(spec) as mean, exchange(spec, op="sum") as total:  # two exchanges at the same time
            one, other = mean.step(gradients(RANK, 0)), total.step(gradients(RANK, 0))
        assert_close({name: x / np.asarray(SIZE, x.dtype) for name, x in other.items()}, one, 1e-6 if spec != "fp16" else 1e-3)


def case_gathers_beyond_what_mpi_counts():
    with mock.patch("grace_ext.frameworks.numpy.mpi.LIMIT", 4000):  # one rank's message is below the limit, those of all ranks are not
        compare(TOPK)
        with exchange() as ours:
            data = np.full(1000 + RANK, RANK, np.uint8)
            handle = ours._transport.start(Collective("allgather", data, "test", sizes=tuple(1000 + rank for rank in range(SIZE))), "test")
            assert len(handle[-1]) == (SIZE if SIZE > 3 else 1)  # one broadcast per rank, or one gather
            assert [(len(x), set(x.tolist())) for x in ours._transport.wait(handle)] == [(1000 + rank, {rank}) for rank in range(SIZE)]
    with mock.patch("grace_ext.frameworks.numpy.mpi.LIMIT", 1000), exchange("none") as ours:
        raises(UnsupportedError, "split it", lambda: ours.step(gradients(RANK, 0)))


def case_sub_communicator_and_foreign_traffic():
    half = WORLD.Split(RANK % 2)
    ones, theirs, pending = np.ones(5), np.zeros(5), []

    def foreign():
        pending.append(half.Iallreduce(ones, theirs))

    with exchange(TOPK, half) as ours:
        if half.rank == 0:
            foreign()
        got = ours.step(gradients(half.rank, 0))
        if half.rank > 0:
            foreign()  # after the exchange, but on rank 0 before it
        again = ours.step(gradients(half.rank, 1))
    pending[0].Wait()
    cluster = grace_ext.LocalCluster(grace_ext.grace(TOPK), half.size)
    assert_same(got, cluster.step(everyones(0, half.size)))
    assert_same(again, cluster.step(everyones(1, half.size)))
    assert theirs.tolist() == [half.size] * 5
    half.Free()


def case_not_finite():
    """If one rank has a NaN in step 1, all ranks get NaN, no state changes, and step 2 continues from there."""
    for spec in (TOPK, "none", "powersgd(rank=2) + residual", "threshold(threshold=0.5) + residual"):
        cluster = grace_ext.LocalCluster(grace_ext.grace(spec), SIZE)
        with exchange(spec) as ours:
            for step in range(3):
                inputs = everyones(step)
                if step == 1:
                    inputs[SIZE - 1]["matrix"][3, 4] = np.nan
                    before = ours.state_dict()
                got, expected = ours.step(inputs[RANK]), cluster.step(inputs)
                if step == 1:
                    assert all(np.isnan(x.astype("f4")).all() for x in got.values() if x.size)
                    assert_same(ours.state_dict()["state"], before["state"])
                else:
                    assert_close(got, expected, 1e-6)


run_cases(Ranks, globals())
