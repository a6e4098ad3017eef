"""Tests `grace-ext plan`: timelines by hand, recorded traces, advice, break-even rates, the command, and what it rejects."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import grace_ext
from grace_ext.cli.app import app, main
from grace_ext.errors import ModelError, ParameterError, UnsupportedError
from grace_ext.exchange.perform import perform
from grace_ext.parts.tensor import TensorSpec
from grace_ext.planning import cached, cost, plan, simulate
from grace_ext.planning import picture as plan_picture
from grace_ext.planning.candidates import candidates
from grace_ext.planning.cost import GOODPUT, Link
from grace_ext.planning.measure import exchange_seconds
from grace_ext.planning.models import shapes_of
from grace_ext.planning.network import OnLink
from grace_ext.planning.probe import MeasuredNetwork, fitted
from grace_ext.planning.trace import Event, Taken, Trace, record, replay

SHAPES = {"conv": (16, 8, 3, 3), "fc": (300, 200), "bias": (300,)}
START = Event("start", name="a", kind="allgather", nbytes=100)
START_SUM = Event("start", name="s", kind="allreduce", nbytes=1e6)


# --- timelines ----------------------------------------------------------------------------------------------------------
def test_a_time_line_by_hand():
    """Work and network overlap; a wait ends when both are done; compute comes before each gradient."""
    b = Event("start", name="b", kind="allreduce", nbytes=50)
    events = [
        Event("gradient"), Event("work", 2.0), START, Event("gradient"), Event("work", 1.0), b, Event("wait", name="a"), Event("work", 4.0),
        Event("wait", name="b"), Event("work", 1.0),
    ]  # fmt: skip
    network = lambda kind, n, nbytes: {"allgather": 5.0, "allreduce": 3.0}[kind]  # noqa: E731
    # a from 2 to 7, b from 7 to 10; work to 3, a is there at 7, work to 11, b is there, work to 12
    timed = replay(events, network, 2)
    assert (timed.step, timed.exchange, timed.work, timed.network) == (12, 12, 8, 8)
    # forward to 3, gradient at 6, a from 8 to 13, gradient at 11, work to 12, b from 13 to 16, a at 13, work to 17, end at 18
    timed = replay(events, network, 2, compute=9.0)
    assert (timed.step, timed.exchange) == (18, 9)


def test_a_trace_for_more_ranks():
    """For each further rank, decoding grows by the time of one more payload; the rest stays."""
    gather = Event("start", name="s", kind="allgather", nbytes=100)
    alone = (Event("work", 1.0), gather, Event("wait", name="s"), Event("work", 3.0))
    pair = (Event("work", 1.5), gather, Event("wait", name="s"), Event("work", 3.5))
    trace = Trace(alone, pair, 1000)
    assert trace.on(2) == list(pair)
    events = trace.on(8)
    assert events[0].work == 1.5 and events[3].work == pytest.approx(3.5 + 6 * 0.5)
    assert trace.nbytes(8) == 100
    assert trace.work(4) == pytest.approx(1.5 + 4.5)


RECORDED = ["none", "topk(ratio=0.1) + residual", "fp16", "powersgd(rank=2) + residual", "qsgd(bits=4)", "signsgd + none"]


@pytest.mark.parametrize("spec", RECORDED)
def test_what_is_recorded_is_what_is_sent(spec):
    """A trace has the bytes of a LocalCluster's collectives for 2 ranks and, extrapolated, for 3 (16-bit sums as transports carry them)."""
    g = grace_ext.grace(spec)
    trace = record(g, SHAPES, steps=1)
    assert trace.dense == 4 * sum(np.prod(dims) for dims in SHAPES.values())
    assert sum(e.what == "gradient" for e in trace.pair) == len(SHAPES)
    assert sum(e.what == "start" for e in trace.pair) == sum(e.what == "wait" for e in trace.pair) > 0
    for n in (2, 3):
        cluster = grace_ext.LocalCluster(g, n)
        cluster.step([{name: np.ones(dims, np.float32) for name, dims in SHAPES.items()} for _ in range(n)])
        carried = {"fp16": 1 + 1 / n}.get(spec, 1.0)
        assert trace.nbytes(n) == pytest.approx(carried * cluster.wire_bytes[0], rel=0.01)


def test_an_exchange_on_a_stated_link_is_that_of_the_formulas():
    """With one bucket nothing overlaps: the exchange takes its work plus the network time of cost.py."""
    trace = record(grace_ext.grace("topk(ratio=0.1) + residual"), SHAPES, steps=1)
    link = Link.of("10mbit", 1e-3)
    timed = plan.Model({"x": trace}, 8).timed("x", OnLink(link))
    assert timed.exchange == pytest.approx(trace.work(8) + cost.allgather(link, 8, trace.nbytes(8)), rel=0.01)


@pytest.mark.parametrize(("n", "per_node"), [(8, 1), (16, 4), (16, 8), (12, 3), (24, 6), (64, 8), (4, 4), (2, 8)])
@pytest.mark.parametrize("nbytes", [1e3, 1e6])
def test_workers_of_a_node_share_its_link(n, per_node, nbytes):
    """The formula equals the simulator's result, message by message; for broadcasts nearly, because their rounds overlap in the simulator.
    Inside one node nothing crosses its link."""
    link, fast = Link.of("1gbit", 1e-4, 1e-3), Link.of("20gbit", 1e-5, 1e-3)
    network = OnLink(link, per_node, fast)
    ways = {"allreduce": "ring", "allgather": "all-gather", "alltoall": "all-to-all", "broadcast": "broadcast"}
    for kind, algorithm in ways.items():
        played = simulate.seconds(algorithm, n, link, nbytes, per_node=min(n, per_node), inside=fast)
        close = pytest.approx(n * played, rel=0.15) if kind == "broadcast" else pytest.approx(played)
        assert network(kind, n, nbytes) == close, kind


@pytest.mark.parametrize(("n", "per_node"), [(64, 4), (256, 4), (1024, 8), (4, 4)])
def test_two_levels_of_sums_are_what_the_simulator_plays(n, per_node):
    """A sum is as large as one gradient, so each node distributes one gradient inside, not one per node."""
    link, fast, m = Link.of("1gbit", 1e-4), Link.of("20gbit", 1e-5), 1e6
    events = (START_SUM, Event("wait", name="s"))
    model = plan.Model({"dense": Trace(events, events, int(m), True)}, n, per_node=per_node, inside=fast)
    played = simulate.seconds("two-level sum", n, link, m, per_node=per_node, inside=fast, dense=m)
    if n == per_node:
        played = cost.allreduce(fast, per_node, m)  # and the sum is there: nothing is handed on
    assert model.timed("dense", OnLink(link, per_node, fast)).exchange == pytest.approx(played)


def test_on_one_node_two_levels_gain_nothing():
    """On one node, two levels sum gradients as the dense exchange does and take as long, so they are no candidate."""
    link, fast = Link.of("100mbit"), Link.of("20gbit", 1e-5)
    dense = made(0.3, 1e6, "allreduce")
    model = plan.Model({"dense": dense, "levels": replace(made(0.1, 1e4), two_level=True)}, 4, per_node=4, inside=fast)
    rows = model.rows(OnLink(link, 4, fast), link)
    assert rows[1].exchange_ms == rows[0].exchange_ms == pytest.approx(300 + 1000 * cost.allreduce(fast, 4, 1e6)) and rows[1].gain == 1
    offered = [candidates((), n, per_node) for n, per_node in ((4, 4), (8, 4), (8, 1))]
    assert [any("hierarchical" in text for text in texts) for texts in offered] == [False, True, False]


def test_two_levels_are_the_nodes_exchange_and_what_is_inside(shapes_json):
    g = grace_ext.grace("topk(ratio=0.1) + residual @ hierarchical")
    trace = record(g, SHAPES, steps=1)
    link, fast = Link.of("10mbit", 1e-3), Link.of("10gbit", 1e-5)
    timed = plan.Model({"x": trace}, 8, per_node=4, inside=fast).timed("x", OnLink(link, 4))
    m, work = trace.nbytes(2), trace.work(2)
    inside = cost.two_level(fast, 4, trace.dense, 0, 2 * m)
    assert timed.exchange == pytest.approx(work + cost.allgather(link, 2, m) + inside, rel=0.01)
    document = json.loads(said(shapes_json, "--rate", "1mbit", "--workers", "8", "--workers-per-node", "4", "--json"))
    best = document["spec"]
    assert best.endswith("@ hierarchical")  # 2 nodes gather an eighth of what 8 workers would
    rows = {row["spec"]: row for row in document["rows"]}
    flat = "topk(ratio=0.01) + residual @ "
    assert rows[flat + "hierarchical"]["network_ms"] < rows[flat + "allgather"]["network_ms"] / 3


# --- advice -------------------------------------------------------------------------------------------------------------
def made(work: float, nbytes: float, kind: str = "allgather") -> Trace:
    start = Event("start", name="a", kind=kind, nbytes=nbytes)
    events = (Event("gradient"), Event("work", work), start, Event("wait", name="a"), Event("work", 0.0))
    return Trace(events, events, 10**6)


MODEL = plan.Model({"dense": made(0.0, 1e6, "allreduce"), "small": made(0.2, 1e4), "slow": made(5.0, 10.0)}, 2)


def rows_at(rate: str, **measured: float) -> list[plan.Prediction]:
    link = Link.of(rate, 0.0)
    return MODEL.rows(OnLink(link), link, measured)


def test_the_fastest_is_recommended_with_its_gain():
    rows = rows_at("10mbit")
    advice = plan.advise(rows)
    dense, small = 1e6 * 8 / 1e7 / GOODPUT, 0.2 + 1e4 * 8 / 1e7 / GOODPUT
    assert advice.spec == "small" and advice.gain == pytest.approx(dense / small)
    assert rows[1].step_ms == pytest.approx(1000 * small) and rows[0].gain == 1
    # 0.2 s of work are worth 990,000 bytes
    assert rows[1].break_even == pytest.approx(990_000 * 8 / 0.2 / GOODPUT, rel=0.02)
    at = OnLink(Link(rows[1].break_even, 0.0))
    assert MODEL.timed("small", at).step == pytest.approx(MODEL.timed("dense", at).step, rel=0.02)


@pytest.mark.parametrize(("gain", "why"), [
    (1.0999, r"small, gains x1\.09, and a gain below x1\.10 is within the model's error"), (0.9, r"small, is no faster \(x0\.90\)"),
])  # fmt: skip
def test_why_dense_is_best_is_no_contradiction(gain, why):
    rows = [replace(row, step_ms=10 / each, gain=each) for row, each in zip(rows_at("10mbit")[:2], (1.0, gain), strict=True)]
    assert re.search(why, plan.advise(rows).reason)


def test_where_it_pays():
    """Less work for more bytes pays above some rate; less of both, always; more of both, never."""
    traces = {"dense": made(0.2, 1e4), "eager": made(0.0, 1e6), "less": made(0.1, 1e3), "more": made(0.3, 1e6)}
    link = Link.of("1gbit", 0.0)
    rows = plan.Model(traces, 2).rows(OnLink(link), link)
    assert [row.pays for row in rows] == ["never", "above", "always", "never"]
    assert [row.break_even is None for row in rows] == [True, False, True, True]
    assert rows[1].break_even == pytest.approx(990_000 * 8 / 0.2 / GOODPUT, rel=0.02) and rows[1].gain > 1


def test_where_two_levels_pay_is_not_told_of_a_job():
    """A measured job does not know how many ranks a node has, so its break-even rate for two levels is unknown."""
    levels = plan.Model({**MODEL.traces, "levels": replace(MODEL.traces["small"], two_level=True)}, 2)
    link = Link.of("10mbit", 0.0)
    stated, measured = (levels.rows(OnLink(link), link, seconds)[-1] for seconds in (None, {"dense": 1.0, "levels": 0.5}))
    assert (stated.pays, measured.pays, measured.break_even) == ("below", "unknown", None)


def test_break_even_rates_go_by_what_was_measured():
    """A candidate that took 0.3 s longer than predicted counts with 0.5 s of work, so its break-even rate is lower."""
    rows = rows_at("40mbit", small=MODEL.timed("small", OnLink(Link.of("40mbit", 0.0))).exchange + 0.3)
    assert rows[1].gain < 1 and rows[1].pays == "below" and rows[1].break_even < 4e7
    assert rows[1].break_even == pytest.approx(990_000 * 8 / 0.5 / GOODPUT, rel=0.02)


def test_dense_is_recommended_where_it_is_best():
    for rate in ("10gbit", f"{rows_at('10mbit')[1].break_even * 0.97 / 1e6:.3f}mbit"):  # on a fast link, and near the break-even
        advice = plan.advise(rows_at(rate))
        assert advice.spec == "dense" and advice.gain == 1 and "dense is best here" in advice.reason
    assert plan.advise(rows_at("10gbit")[:1]).spec == "dense"


def test_real_exchanges_stand_for_themselves():
    told = rows_at("10mbit", dense=1.0, small=0.5)
    assert told[0].exchange_ms == pytest.approx(1000) and told[1].exchange_ms == pytest.approx(500) and told[1].measured_ms == 500
    plain = rows_at("10mbit")
    assert told[1].uncalibrated_ms == pytest.approx(plain[1].exchange_ms)
    assert told[2].measured_ms is None and told[2].exchange_ms == pytest.approx(plain[2].exchange_ms)
    # a measured exchange overlaps as the model's does: with one bucket, half a second of compute hides nothing
    busy = plan.Model(MODEL.traces, 2, compute=0.5).rows(OnLink(Link.of("10mbit", 0.0)), Link.of("10mbit", 0.0), {"small": 0.5})
    assert busy[1].step_ms == pytest.approx(1000)


def test_a_measured_network_is_that_of_its_points():
    points = tuple((kind, 2, size, 0.001 + 1e-8 * size) for kind in ("allreduce", "allgather") for size in (0, 1000, 10**6))
    network = MeasuredNetwork(points, fitted(points))
    assert network("allgather", 2, 500) == pytest.approx(0.001 + 5e-6) and network("allreduce", 2, 5e6) == pytest.approx(0.051)
    assert network("broadcast", 2, 1000) == network("allgather", 2, 1000)
    with pytest.raises(KeyError):
        network("alltoall", 2, 1)


def test_what_starting_takes_grows_with_the_workers():
    """If a sum and a gather take equally long on two ranks, the fit uses latency, not overhead: else thousands would be as fast as two."""
    points = [(kind, 2, size, 1e-3 + 1e-9 * size) for kind in ("allreduce", "allgather") for size in (64, 10**6)]
    link = fitted(points)
    assert link.overhead == 0 and link.latency == pytest.approx(0.75e-3, rel=0.3) and link.beta == pytest.approx(1e-9, rel=0.3)
    known = Link(1e9, latency=1e-4, overhead=1e-3)
    told = fitted([(kind, 2, size, getattr(cost, kind)(known, 2, size)) for kind in ("allreduce", "allgather") for size in (64, 10**6)])
    assert (told.latency, told.overhead) == (pytest.approx(1e-4), pytest.approx(1e-3))


# --- probing --------------------------------------------------------------------------------------------------------------
def test_a_probe_of_a_world_of_one_tells_its_times():
    torch_transports = pytest.importorskip("grace_ext.frameworks.torch.transports")
    from grace_ext.frameworks.torch.ops import HostOps
    from grace_ext.planning.probe import Probe

    here = torch_transports.SingleTransport(HostOps())
    assert perform(Probe(here).largest([1.5, -2.0]), here, {}) == [1.5, -2.0]
    assert perform(exchange_seconds(Probe(here), grace_ext.grace("none"), SHAPES, steps=1), here, {}) > 0


# --- the command ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def shapes_json(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cached.kernels, "cache_folder", lambda: tmp_path / "cache")
    file = tmp_path / "model.json"
    file.write_text(json.dumps({name: list(dims) for name, dims in SHAPES.items()}))
    return str(file)


def said(*arguments: str):
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_command_prints_json_or_a_table_and_keeps_traces(shapes_json, tmp_path, monkeypatch):
    ask = (shapes_json, "topk(ratio=0.01) + residual", "efsignsgd + residual", "--rate", "1mbit", "--workers", "8")
    document = json.loads(said(*ask, "--json"))
    specs = [row["spec"] for row in document["rows"]]
    assert specs == ["none @ allreduce", "topk(ratio=0.01) + residual @ allgather", "efsignsgd + residual @ allgather"]
    assert document["spec"] == specs[1] and document["gain"] > 5 and document["workers"] == 8 and document["link"]["rate"] == 1e6
    table = said(*ask)
    pays = document["rows"][1]["pays"]  # 'below' a rate, or 'always': that depends on how fast this machine encodes
    assert pays in ("below", "always") and all(text in table for text in (specs[1], pays, f"x{document['gain']:.2f}"))  # from the cache
    recorded = []
    monkeypatch.setattr(cached, "record", lambda g, shapes, **how: recorded.append(str(g)) or record(g, shapes, steps=1, **how))
    said(*ask)
    assert not recorded
    said(*ask, "--fresh")
    assert recorded == specs


def test_the_command_says_how_old_its_timings_are_and_how_much_they_differ(shapes_json, monkeypatch):
    """Also cached ones, and if other programs disturbed them; --fresh times the codecs again."""
    ask = (shapes_json, "fp16", "--rate", "1mbit", "--workers", "8")
    taken = {"fp16 @ allreduce": Taken(time.time() - 7300, 0.07, 0.2), "none @ allreduce": Taken(time.time() - 200_000, 0.02, 0.2)}
    monkeypatch.setattr(cached, "record", lambda g, shapes, **how: replace(record(g, shapes, steps=1), taken=taken[str(g)]))
    told = [said(*ask), said(*ask)]  # the second comes from the cache
    assert told[0] == told[1] and "busy" not in told[0]
    assert "Codecs were timed 2 days ago to 2 hours ago, in steps that differed by up to 7%; --fresh times them again." in told[0]
    codecs = json.loads(said(*ask, "--json"))["codecs"]
    assert codecs["fp16 @ allreduce"] == {"age_s": pytest.approx(7300, abs=60), "spread": 0.07, "load": 0.2}
    taken["fp16 @ allreduce"] = Taken(time.time(), 0.8, 3.0)
    notices = json.loads(said(*ask, "--json", "--fresh"))["notices"]
    assert notices == json.loads(said(*ask, "--json"))["notices"] == [
        "this machine was busy when it timed 1 of 2 codecs (a load of 3.0 per processor, and steps that differed by 80%), so the work may "
        "be wrong: stop other programs, and run this again with --fresh"
    ]
    taken["fp16 @ allreduce"] = Taken(time.time(), 0.1, 0.1)
    assert json.loads(said(*ask, "--json", "--fresh"))["notices"] == []


def test_a_compressor_gets_its_natural_memory_and_is_told_so(shapes_json):
    """plan and bench complete specs alike; what was given in full stays as it is, without a word."""
    given = ("topk", "topk(ratio=0.1) @ sparse_allreduce", "randomk", "qsgd", "signsgd", "topk + none")
    ask = (shapes_json, *given, "--rate", "1mbit", "--workers", "4")
    document = json.loads(said(*ask, "--json"))
    assert [row["spec"] for row in document["rows"][1:]] == [
        "topk(ratio=0.01) + residual @ allgather",
        "topk(ratio=0.1) + residual @ sparse_allreduce",
        "randomk(ratio=0.01) + residual(beta=0.9) @ allreduce",
        "qsgd @ allgather",
        "signsgd @ allgather",
        "topk(ratio=0.01) @ allgather",
    ]
    told = [notice for notice in document["notices"] if "busy" not in notice]
    assert [notice.partition(" was given no memory, so it has its natural one: ")[::2] for notice in told] == [
        ("topk", "topk(ratio=0.01) + residual @ allgather"),
        ("topk(ratio=0.1) @ sparse_allreduce", "topk(ratio=0.1) + residual @ sparse_allreduce"),
        ("randomk", "randomk(ratio=0.01) + residual(beta=0.9) @ allreduce"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a memory that was added needs no warning that there is none
        assert "Note: topk was given no memory" in said(*ask)


def test_the_command_says_that_dense_is_best(shapes_json):
    ask = ("--rate", "1tbit", "--latency", "1us", "--workers", "2", "--json")
    document = json.loads(said(shapes_json, "topk(ratio=0.01) + residual", *ask))
    assert document["spec"] == "none @ allreduce" and document["gain"] == 1 and "dense is best" in document["reason"]


def test_compute_hides_the_network(shapes_json):
    """A backward pass hides buckets that are ready early; with only one bucket, ready last, it hides nothing."""
    ask = (shapes_json, "--rate", "10mbit", "--workers", "2", "--json", "fp16")
    alone, after = (json.loads(said(*ask, *more))["rows"][0] for more in ((), ("--compute-ms", "500")))
    assert after["step_ms"] == pytest.approx(500 + alone["step_ms"], rel=0.05)


def test_the_picture_has_all_curves(shapes_json, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "curves.png"
    said(shapes_json, "efsignsgd + residual", "--rate", "1gbit", "--workers", "8", "--picture", str(file))
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize("rank", [0, 1])
def test_only_who_draws_needs_the_folder(rank, shapes_json, monkeypatch):
    """In a job on several hosts, only rank 0's host needs the folder of the picture."""
    monkeypatch.setattr("grace_ext.frameworks.launched.transport", lambda: nullcontext(SimpleNamespace(rank=rank, size=2)))
    done = CliRunner().invoke(app, ["plan", shapes_json, "--measure", "--picture", "no/x.png"])
    if rank == 0:
        assert isinstance(done.exception, ParameterError) and "in an existing folder" in str(done.exception)
    else:
        assert isinstance(done.exception, AttributeError)  # at the probe, because this stub is no transport


def test_the_picture_says_what_its_link_is():
    link = Link(1e8, 2e-4, 1e-3)
    stated, measured = (plan_picture.titled(MODEL, link, fitted) for fitted in (False, True))
    assert stated == "one worker per node:\na link of 100 Mbit/s, 200 us per message, 1000 us per collective"
    assert measured.startswith("fitted to 2 workers, extrapolated for other numbers:\na link of 100 Mbit/s") and "per node" not in measured
    assert plan_picture.titled(plan.Model({}, 8, per_node=4), link, False).startswith("4 workers per node:")


def test_the_picture_shows_what_the_table_says():
    """The curves equal the model's predictions, also for several workers per node, in one level and in two."""
    link, fast = Link.of("1gbit", 1e-4), Link.of("20gbit", 1e-5)
    flat, levels = (record(grace_ext.grace(f"topk(ratio=0.1) + residual{way}"), SHAPES, steps=1) for way in ("", " @ hierarchical"))
    dense = made(0.0, 5e5, "allreduce")  # of 16 bits, which nodes sum in 32
    traces = {"dense": dense, "flat": flat, "levels": levels, "sums": replace(dense, two_level=True)}
    model = plan.Model(traces, 16, per_node=4, inside=fast)
    found = plan_picture.curves(model, link, workers=(2, 4, 16, 62, 64))
    for spec, curve in (("dense", "dense, ring"), ("flat", "flat"), ("levels", "levels")):
        for n in (2, 4, 16, 64):
            assert found[curve][n] == pytest.approx(model.of(n).timed(spec, OnLink(link, min(n, 4), fast)).exchange), (spec, n)
        assert 62 not in found[curve]  # does not fill nodes of 4
    for n in (16, 64):
        played = simulate.seconds("two-level sum", n, link, 5e5, per_node=4, inside=fast, dense=1e6)
        assert found["dense, two-level (4 per node)"][n] == pytest.approx(found["sums"][n]) == pytest.approx(played)


def test_curves_are_those_of_the_closed_forms():
    """The dense ring is drawn for every number of workers, two levels only if nodes are full."""
    link = Link.of("1gbit", 1e-4)
    found = plan_picture.curves(MODEL, link, workers=(2, 8, 64))
    assert found["dense, ring"] == {n: pytest.approx(cost.allreduce(link, n, 1e6)) for n in (2, 8, 64)}
    assert found["small"] == {n: pytest.approx(0.2 + cost.allgather(link, n, 1e4)) for n in (2, 8, 64)}
    assert set(found["dense, two-level (2 per node)"]) == {8, 64}
    assert found["dense, tree"][64] == pytest.approx(cost.tree_allreduce(link, 64, 1e6))


# --- models -----------------------------------------------------------------------------------------------------------------
def test_what_changes_untold_is_seen():
    """Recording finds out that a part exchanges something else at some steps, even if no knob declares its period."""
    with pytest.raises(UnsupportedError, match=r"cser\(reset_period=2\) @ allgather exchanges something else from step to step"):
        record(grace_ext.grace("topk + cser(reset_period=2)"), SHAPES)
    assert candidates(["topk + cser(reset_period=1)"], 2)  # all steps are alike


def test_models_of_torch_and_keras_and_dictionaries(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def make():\n    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))\n"
        "    model[0].bias.requires_grad = False\n    return model\n"
        "class Holder:\n    net = torch.nn.Linear(5, 6)\n"
        "shapes = {'w': [2, 3]}\nnothing = 3\n"
        "def broken():\n    raise OSError('no weights here')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert shapes_of("my_models:make") == {"0.weight": (4, 3), "1.weight": (2, 4), "1.bias": (2,)}
    assert shapes_of("my_models:Holder.net") == {"weight": (6, 5), "bias": (6,)}
    assert shapes_of("my_models:shapes") == {"w": (2, 3)}
    for model, why in {
        "my_models:nothing": "is 3, neither a model nor a callable",
        "my_models:broken": r"my_models:broken'\(\) failed: OSError: no weights here",
        "my_models:absent": "has no 'absent'; it has .*make",
        "no_such_module:f": "cannot import 'no_such_module' for 'no_such_module:f': ModuleNotFoundError",
        "my_models:torch.nn.Identity": "without trainable parameters",
        "json:dumps": "failed: TypeError",
    }.items():
        with pytest.raises(ModelError, match=why):
            shapes_of(model)


def test_the_users_code_prints_and_exits_without_harm(tmp_path, monkeypatch, capfd):
    """stdout stays one JSON document, whatever a module prints from Python or C; a module that exits raises an error."""
    (tmp_path / "loud.py").write_text(
        "import os, sys\nprint('imported with', sys.argv[1:])\nos.write(1, b'from C')\n"
        "def make():\n    print('made')\n    return {'w': [2, 3]}\n"
        "def leaves():\n    sys.exit(4)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.argv", ["grace-ext", "plan", "loud:make"])
    assert shapes_of("loud:make") == {"w": (2, 3)}
    out, err = capfd.readouterr()
    assert out == "" and "imported with []" in err and "from C" in err and "made" in err
    with pytest.raises(ModelError, match=r"loud:leaves'\(\) failed: SystemExit: 4"):
        shapes_of("loud:leaves")
    print("back")
    assert capfd.readouterr().out == "back\n"


def test_what_is_printed_later_than_it_is_said(tmp_path):
    """Output that Python or C buffers for a pipe, and writes only later, goes to stderr too."""
    (tmp_path / "slow.py").write_text(
        "import ctypes, sys\nprint('kept by Python', file=sys.__stdout__)\nctypes.CDLL(None).printf(b'kept by C\\n')\nshapes = {'w': [2]}\n"
    )
    script = "from grace_ext.planning.models import shapes_of; print(shapes_of('slow:shapes'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", script], env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.stdout == "{'w': (2,)}\n" and "kept by Python" in done.stderr and "kept by C" in done.stderr


def test_16_bit_models_are_as_long_as_they_are(tmp_path, monkeypatch):
    """fp16 gains nothing if gradients have 16 bits already."""
    torch = pytest.importorskip("torch")
    (tmp_path / "half.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(30, 20, dtype=torch.bfloat16)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shapes = shapes_of("half:make")
    assert shapes["weight"] == TensorSpec("weight", (20, 30), "bfloat16") and torch.bfloat16.itemsize == 2
    dense, half = (record(grace_ext.grace(spec), shapes, steps=1).nbytes(2) for spec in ("none", "fp16"))
    full = record(grace_ext.grace("none"), {name: spec.shape for name, spec in shapes.items()}, steps=1).nbytes(2)
    assert dense == half < full
    double = record(grace_ext.grace("none"), {"w": TensorSpec("w", (10,), "float64"), "b": (10,)}, steps=1)
    assert double.dense == 120 and double.nbytes(2) >= 120


def test_a_lazy_model_has_no_shapes(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "lazy.py").write_text("import torch\ndef make():\n    return torch.nn.LazyLinear(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="parameters have no shape yet: .*run it once before"):
        shapes_of("lazy:make")


def test_a_file_that_windows_wrote(tmp_path):
    file = tmp_path / "m.json"
    file.write_text('{"w": [2]}', encoding="utf-8-sig")
    assert shapes_of(str(file)) == {"w": (2,)}


def test_the_help_says_what_shapes_look_like():
    assert '{"name": [dims...]}' in CliRunner().invoke(app, ["plan", "--help"]).stdout


def test_a_keras_model(tmp_path, monkeypatch):
    pytest.importorskip("keras")
    (tmp_path / "my_keras.py").write_text(
        "import keras\n"
        "def make():\n    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])\n"
        "def unbuilt():\n    return keras.Sequential([keras.layers.Dense(4)])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sorted(shapes_of("my_keras:make").values()) == [(3, 4), (4,)]
    with pytest.raises(ModelError, match="must be built first"):
        shapes_of("my_keras:unbuilt")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "holds \\[\\], expected a dictionary"),
        ("{}", "expected a dictionary of names and shapes that is not empty"),
        ('{"w": 3}', "the shape of 'w' is 3, expected a list of whole numbers"),
        ('{"w": [2, -1]}', "the shape of 'w' is \\[2, -1\\]"),
        ('{"w": [2.5]}', "the shape of 'w'"),
        ('{"w": [true]}', "the shape of 'w'"),
        ('{"w": [0]}', "no element in any of its 1 tensors"),
        ('{"w": [99999999999999999999]}', "has 99,999,999,999,999,999,999 elements, which is more than any model has"),
    ],
)
def test_bad_shapes(tmp_path, content, why):
    file = tmp_path / "m.json"
    file.write_text(content)
    with pytest.raises(ModelError, match=why):
        shapes_of(str(file))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["no_such_module:f", "--rate", "1gbit", "--workers", "2"], "grace-ext: cannot import 'no_such_module'"),
        (["absent.json", "--rate", "1gbit", "--workers", "2"], "grace-ext: cannot read 'absent.json': No such file"),
        (["absent", "--rate", "1gbit", "--workers", "2"], "grace-ext: there is no file 'absent', and it is not module:callable"),
        (["MODEL", "--workers", "2"], "grace-ext: plan needs --rate and --workers"),
        (["MODEL", "--rate", "fast", "--workers", "2"], "grace-ext: 'fast' is no rate: give a number above 0 with a unit, such as"),
        (["MODEL", "--rate", "1gbit", "--latency", "50", "--workers", "2"], "grace-ext: a time is a number and one of us, ms, s"),
        (["MODEL", "topj", "--rate", "1gbit", "--workers", "2"], "grace-ext: no compressor named 'topj'; did you mean 'topk'"),
        (["MODEL", "--rate", "1gbit", "--workers", "7", "--workers-per-node", "2"], "grace-ext: 7 workers do not fill nodes of 2"),
        (["MODEL", "--measure"], "grace-ext: --measure needs a job of two ranks"),
        (["MODEL", "--measure", "--rate", "1gbit", "--workers-per-node", "2"], "in the job; leave out --rate, --workers-per-node"),
        (["MODEL", "auto", "--rate", "1gbit", "--workers", "2"], "changes from step to step, and a plan predicts one step; compare what"),
        (["MODEL", "every(2, none, topk + residual)", "--rate", "1gbit", "--workers", "2"], "'none @ allreduce', 'topk(ratio=0.01) + res"),
        (["MODEL", "topk + cser", "--rate", "1gbit", "--workers", "2"], "cser exchanges something else every 8 steps (reset_period)"),
        (["MODEL", "by_size(large=powersgd_plus + residual)", "--rate", "1gbit", "--workers", "2"], "every 50 steps (refresh_period)"),
        (["MODEL", "--rate", "1gbit", "--workers", "2", "--latency", f"{'9' * 400}s"], "latency and overhead must be finite"),
        (["MODEL", "--rate", "1gbit", "--workers", "2", "--compute-ms", "inf"], "--compute-ms must be a number of milliseconds, got inf"),
        (["MODEL", "--rate", "1gbit", "--workers", "2", "--picture", "no/x.png"], "cannot write the picture 'no/x.png': it must end"),
        (["MODEL", "--rate", "1gbit", "--workers", "2", "--picture", "."], "cannot write the picture '.'"),
    ],
)
def test_mistakes_are_one_line(arguments, why, shapes_json, monkeypatch, capsys):
    """A mistake gives exit code 2 and an error that says what was seen and what to do, without a traceback."""
    if "--measure" in arguments:
        pytest.importorskip("torch")
    monkeypatch.setattr("sys.argv", ["grace-ext", "plan", *[shapes_json if a == "MODEL" else a for a in arguments]])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and why in told and "Traceback" not in told
