"""Cases of use and misuse of the numpy Exchange over MPI: arguments, disagreement, errors, state.  mpi_use_job.py [die [suddenly]]

Prints 'CASE name ok' for each case that holds on all ranks.
"""

from __future__ import annotations

import os
import pickle
from unittest import mock

import numpy as np
from mpi_setup import ARGUMENTS, RANK, SIZE, TOPK, Ranks, exchange, gradients

import grace_ext
import grace_ext.frameworks.numpy as gnp
from grace_ext.errors import (
    DisagreementError,
    GraceError,
    NamesError,
    ParameterError,
    PayloadError,
    TensorChangedError,
    UnsupportedDtypeError,
    UnsupportedError,
)
from grace_ext.exchange.message import message

from cases import assert_same, raises, run_cases  # isort: skip
from mpi4py import MPI  # isort: skip


def case_disagreement():
    """Disagreement raises on all ranks; the same Exchange can then be used correctly."""
    other = RANK == SIZE - 1 and SIZE > 1
    if SIZE == 1:
        return
    with exchange("topk(ratio=0.2) + residual" if other else TOPK) as ours:
        raises(DisagreementError, f"rank {SIZE - 1} uses 'topk(ratio=0.2)", lambda: ours.step(gradients(RANK, 0)))
    with exchange(grace_ext.grace(TOPK, seed=int(other))) as ours:
        raises(DisagreementError, "seed 1", lambda: ours.step(gradients(RANK, 0)))
    with exchange(TOPK) as ours:
        inputs = gradients(RANK, 0)
        renamed = {name + "x" * other: x for name, x in inputs.items()}
        raises(DisagreementError, "other parameters", lambda: ours.step(renamed))
        reordered = dict(reversed(inputs.items())) if other else inputs
        raises(DisagreementError, "order of the parameters", lambda: ours.step(reordered))
        assert ours.step(inputs)["matrix"].any()
    raises(DisagreementError, "'sum'", lambda: exchange(TOPK, op="sum" if other else "mean"))


def case_agreement_between_steps():
    weights = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float32)}
    with exchange(TOPK) as ours:
        for step in range(2):
            ours.step(gradients(RANK, step))
            ours.check_agreement()
            ours.check_agreement(weights)
        if SIZE > 1:
            weights["b"] = weights["b"] + np.float32(RANK == 1)
            raises(DisagreementError, "rank 1: 1 of 2 parameters differ: b", lambda: ours.check_agreement(weights))
        ours.step(gradients(RANK, 2))


def case_metrics():
    """Metrics work on every rank; they probe the network before the first step, unless there is a single rank."""
    with exchange() as plain, exchange() as ours:
        metrics = ours.measure(every=2)
        for step in range(4):
            assert_same(ours.step(gradients(RANK, step)), plain.step(gradients(RANK, step)))
        report = ours.metrics()
        assert (report["step"], report["rank"], report["size"], report["measured_at"]) == (3, RANK, SIZE, 2)
        assert report["total"]["bytes"] == ours.wire_bytes == plain.wire_bytes and report["total"]["relative_error"] > 0
        assert (metrics._recorders[0]._network is None) == (SIZE == 1) and plain.metrics() == {}


def case_names_and_dtypes():
    with exchange() as ours:
        raises(UnsupportedDtypeError, "int64", lambda: ours.step({"a": np.ones(3), "b": np.arange(3)}))
        ours.step(gradients(RANK, 0))
        state = ours.state_dict()
        missing = {name: x for name, x in gradients(RANK, 1).items() if name != "bias"}
        raises(NamesError, f"rank {RANK}: missing parameters ['bias'], unknown parameters []", lambda: ours.step(missing))
        raises(NamesError, "unknown parameters ['more']", lambda: ours.step({**gradients(RANK, 1), "more": np.ones(1)}))
        raises(TensorChangedError, "float32[7]", lambda: ours.step({**gradients(RANK, 1), "bias": np.ones(8, np.float32)}))
        assert_same(ours.state_dict()["state"], state["state"])
        ours.step(gradients(RANK, 1))


def case_arguments():
    raises(ParameterError, "op must be 'mean' or 'sum'", lambda: exchange(op="max"))
    raises(ParameterError, "mpi4py communicator", lambda: gnp.Exchange(TOPK, "world"))
    raises(UnsupportedError, "belongs to", lambda: gnp.Exchange(TOPK, MPI.COMM_NULL))


def case_what_is_not_arrays_by_name():
    e, local = exchange(TOPK), gnp.LocalSGD("none", every=2)
    for wrong, error, said in (
        (np.ones(3, np.float32), ParameterError, "got ndarray"),
        ([np.ones(3)], ParameterError, "got list"),
        ({"a": np.ones(3), 1: np.ones(3)}, NamesError, "must be strings, got 1 (int) in place 1"),
        ({"a\ud800": np.ones(3)}, NamesError, "valid text, got 'a\\ud800' in place 0"),
    ):
        for call in (e.step, e.check_agreement, local.start, local.gradients, local.step, local.sync):
            raises(error, said, lambda call=call, wrong=wrong: call(wrong))


def case_resume():
    for spec in (TOPK, "randomk(ratio=0.1) + residual", "powersgd(rank=2) + residual", "qsgd"):
        with exchange(spec) as whole, exchange(spec) as first, exchange(spec) as second:
            expected = [whole.step(gradients(RANK, step)) for step in range(4)]
            for step in range(2):
                first.step(gradients(RANK, step))
            saved = pickle.loads(pickle.dumps(first.state_dict()))
            assert (saved["rank"], saved["size"], saved["step"]) == (RANK, SIZE, 2)
            raises(GraceError, "one of 7 ranks", lambda: second.load_state_dict({**saved, "size": 7}))  # noqa: B023
            raises(UserWarning, f"saved by rank {SIZE}", lambda: second.load_state_dict({**saved, "rank": SIZE}))  # noqa: B023
            second.load_state_dict(saved)
            for step in (2, 3):
                assert_same(second.step(gradients(RANK, step)), expected[step])


def case_nothing_is_shared():
    """The caller's arrays and all results are separate: writing to one changes no other."""
    with exchange("none") as ours:
        inputs = gradients(RANK, 0)
        first = ours.step(inputs)
        kept = {name: x.copy() for name, x in first.items()}
        assert_same(inputs, gradients(RANK, 0))
        for x in inputs.values():
            x[...] = 7
        second = ours.step(gradients(RANK, 1))
        for x in second.values():
            x[...] = 5
        assert_same(first, kept)


def case_bad_payload():
    """After a bad payload, every rank gets an error that names its sender; the Exchange then raises in every step and keeps its state."""
    with exchange() as ours:
        ours.step(gradients(RANK, 0))
        state = ours.state_dict()
        def corrupt(*args, **options):
            data = message(*args, **options)
            data[8] ^= RANK == 0
            return data

        with mock.patch("grace_ext.exchange.fusing.message", corrupt):
            raises(PayloadError, "payload of rank 0", lambda: ours.step(gradients(RANK, 1)))
        raises(GraceError, "error in the middle of a step", lambda: ours.step(gradients(RANK, 1)))
        assert_same(ours.state_dict()["state"], state["state"])


def case_closed():
    ours = exchange()
    ours.step(gradients(RANK, 0))
    ours.close()
    ours.close()
    raises(GraceError, "is closed", lambda: ours.step(gradients(RANK, 0)))
    assert ours._transport.comm == MPI.COMM_NULL  # the communicator was freed
    raises(ZeroDivisionError, "", leave_by_error)


def case_byte_order():
    """Arrays in the other byte order, as from netCDF, FITS or HDF5 files, count by their values. Results are in this machine's order."""

    def swapped(arrays):
        return {name: x.astype(x.dtype.newbyteorder()) for name, x in arrays.items()}

    for simulate in (True, False):
        with gnp.Exchange(TOPK, simulate=simulate) as ours, gnp.Exchange(TOPK, simulate=simulate) as native:
            for step in range(2):
                given = gradients(RANK, step)
                given = given if RANK == 1 else swapped(given)
                got = ours.step(given)
                assert_same(got, native.step(gradients(RANK, step)))
                assert all(x.dtype.isnative for x in got.values())
            weights = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float32)}
            ours.check_agreement(weights if RANK == 1 else swapped(weights))
    with exchange("none") as ours:
        precise = ours.step({"w": np.array([1 + 2.0**-40, 1e300], ">f8")})["w"]
        assert precise.dtype == np.float64 and (precise == [1 + 2.0**-40, 1e300]).all()
    local = gnp.LocalSGD(every=1, simulate=True)
    weights = local.start({"w": np.array([1 + 2.0**-40, 1e300], ">f8")})
    assert weights["w"].dtype == np.float64 and (weights["w"] == [1 + 2.0**-40, 1e300]).all()


def leave_by_error():
    with exchange():
        raise ZeroDivisionError


def case_one_rank():
    """At world size 1 nothing is compressed unless simulate=True."""
    alone = MPI.COMM_SELF
    with gnp.Exchange(TOPK, alone) as ours:
        inputs = gradients(RANK, 0)
        got = ours.step(inputs)
        assert_same(got, inputs)
        assert ours.wire_bytes == 0 and not any(np.shares_memory(got[name], inputs[name]) for name in got)
        raises(NamesError, "missing", lambda: ours.step({}))
    with gnp.Exchange(TOPK, alone, simulate=True) as ours:
        cluster = grace_ext.LocalCluster(grace_ext.grace(TOPK), 1)
        for step in range(2):
            assert_same(ours.step(gradients(0, step)), cluster.step([gradients(0, step)]))
            assert [ours.wire_bytes] == cluster.wire_bytes


if "die" in ARGUMENTS:  # rank 1 dies, or raises, in the middle of the job, while the others wait for it
    with exchange() as ours:
        ours.step(gradients(RANK, 0))
        if RANK == 1:
            os._exit(3) if "suddenly" in ARGUMENTS else ours.step({})
        ours.step(gradients(RANK, 1))
run_cases(Ranks, globals())
