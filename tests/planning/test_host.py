"""Tests what a plan adds for copies between GPU and host: by hand, from a cluster's bytes, in two levels, and by the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import grace_ext
from grace_ext.cli.app import app
from grace_ext.errors import ParameterError
from grace_ext.parts.tensor import TensorSpec
from grace_ext.planning import cached, plan
from grace_ext.planning import picture as plan_picture
from grace_ext.planning.cost import GOODPUT, Link
from grace_ext.planning.host import HostCopies
from grace_ext.planning.network import OnLink
from grace_ext.planning.trace import Event, Trace, record

LINK = Link.of("10mbit", 0.0)
#: 500 bytes per second in each direction.
SLOW = HostCopies(4000.0, "gradients", 50)


def made(work: float, nbytes: float, kind: str = "allgather") -> Trace:
    start = Event("start", name="a", kind=kind, nbytes=nbytes)
    events = (Event("gradient"), Event("work", work), start, Event("wait", name="a"), Event("work", 0.0))
    return Trace(events, events, 10**6)


TRACES = {"dense": made(0.0, 1e6, "allreduce"), "small": made(0.1, 1e4)}


def test_gradients_are_copied_both_ways_by_all_but_dense():
    """50 bytes to the host and 50 back, at 500 bytes per second, are 0.2 s, which no backward pass hides."""
    for compute in (0.0, 3.0):
        plain, copying = (plan.Model(TRACES, 2, compute=compute, host=host).rows(OnLink(LINK), LINK) for host in (None, SLOW))
        assert [row.copy_ms for row in plain] == [0, 0] and [row.copy_ms for row in copying] == [0, pytest.approx(200)]
        assert copying[0].step_ms == plain[0].step_ms
        assert copying[1].step_ms == pytest.approx(plain[1].step_ms + 200)
        assert copying[1].exchange_ms == pytest.approx(plain[1].exchange_ms + 200)
        assert (copying[1].work_ms, copying[1].network_ms, copying[1].nbytes) == (plain[1].work_ms, plain[1].network_ms, plain[1].nbytes)
    assert copying[1].gain == pytest.approx(copying[0].step_ms / copying[1].step_ms)


def test_the_break_even_rate_falls():
    """990,000 bytes less on the network are worth 0.1 s of work and 0.2 s of copies."""
    rows = plan.Model(TRACES, 2, host=SLOW).rows(OnLink(LINK), LINK)
    assert rows[1].pays == "below" and rows[1].break_even == pytest.approx(990_000 * 8 / 0.3 / GOODPUT, rel=0.02)


def test_dense_is_recommended_if_copies_take_what_compression_gains():
    """On this link the gain is 0.8 s less 0.1 s of work: 1 s of copies takes all of it."""
    advice = [plan.advise(plan.Model(TRACES, 2, host=host).rows(OnLink(LINK), LINK)) for host in (SLOW, replace(SLOW, nbytes=250))]
    assert [each.spec for each in advice] == ["small", "dense"]


def test_measured_exchanges_have_no_copies_so_they_are_added():
    rows = plan.Model(TRACES, 2, host=SLOW).rows(OnLink(LINK), LINK, {"dense": 1.0, "small": 0.5})
    plain = plan.Model(TRACES, 2).rows(OnLink(LINK), LINK)
    assert [row.step_ms for row in rows] == [pytest.approx(1000), pytest.approx(700)]
    assert [row.measured_ms for row in rows] == [1000, 500]
    assert [row.uncalibrated_ms for row in rows] == [pytest.approx(row.exchange_ms) for row in plain]


@pytest.mark.parametrize("n", [2, 5])
def test_collectives_are_copied_as_they_are_taken_and_given(n):
    """A rank hands over its array; of a sum and an all-to-all it gets as much, of a gather and of broadcasts everybody's."""
    copied = {"allreduce": 100 + 100, "alltoall": 100 + 100, "allgather": 100 + 100 * n, "broadcast": 100 + 100 * n}
    model = plan.Model({kind: made(0.0, 100, kind) for kind in copied}, n, host=replace(SLOW, copied="collectives"))
    for kind, nbytes in copied.items():
        assert model.timed(kind, OnLink(LINK)).copies == pytest.approx(nbytes / 500), kind


@pytest.mark.parametrize("spec", ["none", "topk(ratio=0.1) + residual", "qsgd(bits=4)"])
def test_copied_collectives_are_those_of_a_cluster(spec):
    shapes, n = {"conv": (16, 8, 3, 3), "fc": (300, 200)}, 3
    g = grace_ext.grace(spec)
    cluster = grace_ext.LocalCluster(g, n)
    cluster.step([{name: np.ones(dims, np.float32) for name, dims in shapes.items()} for _ in range(n)])
    sent = cluster.wire_bytes[0]
    seen = plan.Model({"x": record(g, shapes, steps=1)}, n, host=replace(SLOW, copied="collectives")).timed("x", OnLink(LINK))
    assert seen.copies == pytest.approx((sent + (1 if spec == "none" else n) * sent) / 500, rel=0.01)


def test_in_two_levels_the_first_worker_of_a_node_copies_most():
    """Dense sums inside (1,000,000 bytes each way), the nodes' exchange, and its results again, which it hands on. On one node: the dense
    exchange of all workers. Gradients are copied once each way, however many levels there are."""
    traces = {"dense": TRACES["dense"], "levels": replace(TRACES["small"], two_level=True)}
    network = OnLink(LINK, 4)
    by_nodes = {2: 2 * 10**6 + 10**4 * (1 + 2) + 10**4 * 2, 1: 2 * 10**6}
    for nodes, nbytes in by_nodes.items():
        model = plan.Model(traces, 4 * nodes, per_node=4, host=replace(SLOW, copied="collectives"))
        assert model.timed("levels", network).copies == pytest.approx(nbytes / 500)
        assert plan.Model(traces, 4 * nodes, per_node=4, host=SLOW).timed("levels", network).copies == pytest.approx(0.2)


def test_curves_have_the_copies():
    found = [plan_picture.curves(plan.Model(TRACES, 2, host=host), LINK, workers=(2, 8)) for host in (None, SLOW)]
    for name, points in found[0].items():
        assert found[1][name] == pytest.approx({n: seconds + (0.2 if name == "small" else 0) for n, seconds in points.items()}), name
    titles = [plan_picture.titled(plan.Model(TRACES, 2, host=host), LINK, False) for host in (None, replace(SLOW, rate=48e9))]
    assert titles[1] == titles[0] + "\ngradients copied between GPU and host at 6 GB/s"


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ParameterError, match="must be a positive number of bits per second"):
        HostCopies(rate, "gradients", 1)


# --- the command ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cached.kernels, "cache_folder", lambda: tmp_path / "cache")
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"w": [300, 200], "b": [200]}))
    return str(file)


def said(model: str, *more: str) -> str:
    done = CliRunner().invoke(app, ["plan", model, "fp16", "efsignsgd + residual", "--rate", "1gbit", "--workers", "4", *more])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_command_adds_copies_in_a_column_of_their_own(model):
    """60,200 float32 elements at 1 MB/s: 0.2408 s each way."""
    assert "copies" not in said(model)
    told = said(model, "--host-copy", "1 MB/s")
    assert "481.6 ms" in told and "copies 0.2408 MB of gradients to the host and 0.2408 MB back" in " ".join(told.split())
    plain, gradients, collectives = (
        json.loads(said(model, "--json", *more))
        for more in ((), ("--host-copy", "1MB/s"), ("--host-copy", "8mbit", "--copied", "collectives"))
    )
    assert plain["host_copy"] is None and all(row["copy_ms"] == 0 for row in plain["rows"])
    assert gradients["host_copy"] == {"rate": 8e6, "copied": "gradients", "nbytes": 240_800}
    assert [row["copy_ms"] for row in gradients["rows"]] == [0, pytest.approx(481.6), pytest.approx(481.6)]
    for before, after in zip(plain["rows"], gradients["rows"], strict=True):
        assert after["step_ms"] == pytest.approx(before["step_ms"] + after["copy_ms"])
    assert gradients["spec"] == "none @ allreduce" and any("while 'none' in grace_ext copies" in notice for notice in gradients["notices"])
    dense, half, signs = (row["copy_ms"] for row in collectives["rows"])
    # fp16: 120,400 bytes to all and from all, then a quarter is given and all is gathered
    assert dense == pytest.approx(481.6, rel=1e-3) and half == pytest.approx(120.4 * 3.25, rel=1e-3) and signs < 0.1 * dense
    assert not any("NCCL" in notice for notice in collectives["notices"])


def test_gradients_of_16_bits_are_as_long_as_they_are(tmp_path, model, monkeypatch):
    (tmp_path / "half_model.py").write_text(
        "from grace_ext.parts.tensor import TensorSpec\nshapes = {'w': TensorSpec('w', (300, 200), 'bfloat16'), 'b': (200,)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = json.loads(said("half_model:shapes", "--json", "--host-copy", "1 GB/s"))
    assert told["host_copy"]["nbytes"] == 2 * 60_000 + 4 * 200 == TensorSpec("w", (60_000,), "bfloat16").nbytes + 800


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--host-copy", "fast"), "'fast' is no rate: give a number above 0 with a unit"),
        (("--host-copy", "6"), "'6' is no rate"),
        (("--host-copy", "0 GB/s"), "'0 GB/s' is no rate"),
        (
            ("--host-copy", "6 GB/s", "--copied", "weights"),
            "'weights' is not what is copied between GPU and host: give one of gradients, coll",
        ),
        (
            ("--copied", "gradients"),
            "--copied says what is copied between GPU and host: give the rate of these copies, too, by --host-copy",
        ),
    ],
)
def test_mistakes_say_the_way_out(options, why, model):
    done = CliRunner().invoke(app, ["plan", model, "fp16", "--rate", "1gbit", "--workers", "4", *options])
    assert isinstance(done.exception, ParameterError) and why in str(done.exception)
