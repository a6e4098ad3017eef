"""Metrics change nothing, equal an independent computation, and warn once per problem."""

from __future__ import annotations

import json
import logging
import time

import numpy as np
import pytest

import grace_ext
from grace_ext.driver.driver import Driver
from grace_ext.driver.observer import Observer
from grace_ext.errors import GraceError, ParameterError
from grace_ext.exchange.message import HEADER
from grace_ext.exchange.perform import perform
from grace_ext.exchange.transport import Transport
from grace_ext.metrics.advice import allowed_residual
from grace_ext.metrics.metrics import Metrics, scalars
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WITH_DEVICE, same_bits, states

from .. import catalog

SHAPES = {"matrix": (24, 50), "vector": (700,), "empty": (0, 3), "scalar": ()}


def gradients(size: int, step: int) -> list[dict[str, np.ndarray]]:
    return inputs.ranks(size, step, shapes=SHAPES)


@pytest.mark.parametrize("spec", catalog.shelf())
def test_results_states_and_bytes_are_those_without_metrics(spec):
    """This holds for steps with and without a close look, and if only one rank measures, as when only rank 0 writes."""
    g = grace_ext.grace(spec)
    plain, measured, alone = (NUMPY.cluster(g, 2) for _ in range(3))
    measured.measure(every=2)
    Metrics(every=2).attach(alone.drivers[1])
    for step in range(4):
        out = [NUMPY.step(cluster, gradients(2, step)) for cluster in (plain, measured, alone)]
        assert same_bits(out[0], out[1]) and same_bits(out[0], out[2])
        for before, *others in zip(*(states(cluster, NUMPY) for cluster in (plain, measured, alone)), strict=True):
            assert all(same_bits(before, other) for other in others)
        assert plain.wire_bytes == measured.wire_bytes == [report["total"]["bytes"] for report in measured.metrics()]
    assert all(type(driver.observer) is Observer for driver in plain.drivers) and plain.metrics() == []


@pytest.mark.parametrize("world", WITH_DEVICE, ids=lambda world: world.name)
def test_values_are_those_of_an_independent_computation(world):
    cluster = world.cluster(grace_ext.grace("topk(ratio=0.1) + residual"), 2)
    cluster.measure(every=1)
    shapes = {"w": (40, 50), "b": (300,)}
    residual = {name: np.zeros(np.prod(shape)) for name, shape in shapes.items()}
    total_error = dict.fromkeys(shapes, 0.0)
    for step in range(3):
        given = inputs.ranks(2, step, shapes=shapes)
        world.step(cluster, given)
        report = cluster.metrics()[1]
        errors, norms = [], []
        for name in shapes:
            grad = given[1][name].astype(np.float64).reshape(-1)
            p = residual[name] + grad
            kept = np.argsort(-np.abs(p))[: len(p) // 10]
            residual[name] = p.copy()
            residual[name][kept] = 0
            errors.append(np.sum(residual[name] ** 2))
            norms.append(np.sum(p**2))
            total_error[name] += errors[-1]
            values = report["parameters"][name]
            assert values["relative_error"] == pytest.approx(np.sqrt(errors[-1] / norms[-1]), rel=1e-4)
            assert values["total_error"] == pytest.approx(total_error[name], rel=1e-4)
            assert values["residual_norm"] == pytest.approx(np.linalg.norm(residual[name]), rel=1e-4)
            assert values["gradient_norm"] == pytest.approx(np.linalg.norm(grad), rel=1e-5)
            assert values["dense_bytes"] == 4 * grad.size and values["ratio"] == pytest.approx(4 * grad.size / values["bytes"])
        total = report["total"]
        assert total["relative_error"] == pytest.approx(np.sqrt(sum(errors) / sum(norms)), rel=1e-4)
        assert total["total_error"] == pytest.approx(sum(total_error.values()), rel=1e-4)
        assert total["bytes"] == cluster.wire_bytes[1] == HEADER.size + sum(v["bytes"] for v in report["parameters"].values())
        assert (report["step"], report["rank"], report["size"], report["measured_at"], report["committed"]) == (step, 1, 2, step, True)


@pytest.mark.parametrize("spec", ["threshold(threshold=1) + none", "powersgd + residual", "qsgd + none @ reduce_scatter", "fp16 + none"])
def test_bytes_of_parameters_are_those_declared(spec):
    """The bytes per parameter include counts of variable fields, all rounds, shards, and 16-bit sums."""
    g = grace_ext.grace(spec)
    cluster = NUMPY.cluster(g, 2)
    cluster.measure()
    NUMPY.step(cluster, gradients(2, 0))
    report, other = cluster.metrics()
    for name, values in report["parameters"].items():
        bound = g.nbytes(TensorSpec(name, SHAPES[name]), 2)
        assert 0 < values["bytes"] <= bound or not values["dense_bytes"], name
        most = max(values["bytes"], other["parameters"][name]["bytes"])  # one of them sends the mean of this tensor on
        assert most == bound or "threshold" in spec, name
    assert report["parameters"]["empty"]["bytes"] == 0 and report["parameters"]["empty"]["ratio"] is None


def test_times_are_means_of_the_steps_between():
    """Encode, communicate and decode seconds are means over the steps since the last close look (it does not count); they sum to a step."""
    cluster = NUMPY.cluster(grace_ext.grace("topk + residual"), 1)
    (metrics,) = cluster.measure(every=50)
    cluster.step(gradients(1, 0))
    begin = time.perf_counter()
    for step in range(20):
        cluster.step(gradients(1, step))
    whole = (time.perf_counter() - begin) / 20
    total = cluster.metrics()[0]["total"]
    assert metrics._recorders[0].steps == 20
    parts = [total[key] for key in ("encode_seconds", "communicate_seconds", "decode_seconds")]
    assert min(parts) > 0 and 0.3 * whole < sum(parts) <= whole
    for parameter in cluster.metrics()[0]["parameters"].values():
        assert parameter["encode_seconds"] <= total["encode_seconds"] and parameter["decode_seconds"] <= total["decode_seconds"]


def test_reports_go_to_files_and_sinks(tmp_path):
    cluster = NUMPY.cluster(grace_ext.grace("topk + residual"), 2)
    seen = []
    cluster.measure(every=3, jsonl=tmp_path / "rank{rank}.jsonl", sinks=[seen.append])
    for step in range(7):
        cluster.step(gradients(2, step))
    for rank in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]
        assert [(line["step"], line["rank"]) for line in lines] == [(0, rank), (3, rank), (6, rank)]
        assert lines == [report for report in seen if report["rank"] == rank]
    tags = dict(scalars(seen[-1]))
    assert tags["grace/total/ratio"] > 1 and tags["grace/matrix/relative_error"] > 0 and "grace/empty/ratio" not in tags
    only = NUMPY.cluster(grace_ext.grace("topk + residual"), 2)
    only.measure(jsonl=tmp_path / "one.jsonl")
    only.step(gradients(2, 0))
    assert [json.loads(line)["rank"] for line in (tmp_path / "one.jsonl").read_text().splitlines()] == [0]


def test_a_step_that_is_not_finite_is_reported_as_such(tmp_path):
    cluster = NUMPY.cluster(grace_ext.grace("topk + residual"), 1)
    cluster.measure(every=1, jsonl=tmp_path / "file")
    bad = gradients(1, 0)
    bad[0]["vector"][3] = np.nan
    with np.errstate(all="ignore"):
        cluster.step(bad)
    report = json.loads((tmp_path / "file").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert not report["committed"] and report["parameters"]["vector"]["gradient_norm"] is None
    assert report["parameters"]["vector"]["relative_error"] is None and report["parameters"]["matrix"]["relative_error"] > 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ParameterError, match="every must be"):
        Metrics(0)
    driver = NUMPY.cluster(grace_ext.grace("topk + residual"), 1).drivers[0]
    driver.register([TensorSpec("w", (300,))])
    list(driver.put("w", np.ones(300, np.float32)))
    with pytest.raises(GraceError, match="between steps"):
        Metrics().attach(driver)


# --- warnings ---------------------------------------------------------------------------------------------------------
def told(caplog, spec: str, gradient, steps: int, every: int = 5, **options) -> list[str]:
    """Makes this many steps on two ranks. Returns the warnings that are logged."""
    cluster = NUMPY.cluster(grace_ext.grace(spec), 2)
    cluster.measure(every=every, **options)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "grace_ext"), np.errstate(all="ignore"):
        for step in range(steps):
            cluster.step([gradient(step, rank) for rank in range(2)], lr=0.1)
    return [record.message for record in caplog.records]


def noise(step: int, rank: int) -> dict[str, np.ndarray]:
    return inputs.normal(rank, step, shapes={"w": (64, 64)})


def test_a_residual_that_explodes(caplog):
    """A quantizer with more variance than signal makes the residual grow without bound; rank 0 warns once."""
    said = told(caplog, "qsgd(levels=1) + residual", noise, 60)
    assert len(said) == 1 and "'w'" in said[0] and "explodes" in said[0] and "topk" in said[0]


@pytest.mark.parametrize(
    "spec", ["topk(ratio=0.01) + residual", "efsignsgd + residual", "powersgd + residual", "fp16 + residual", "threshold + residual",
             "topk(ratio=0.05) + dgc", "onebit + efsignsgd", "randomk(ratio=0.05) + residual", "none + residual", "qsgd + none"]
)  # fmt: skip
@pytest.mark.parametrize("constant", [False, True])
def test_a_residual_within_its_bound_is_not_spoken_of(caplog, spec, constant):
    """There is no warning, even for constant gradients, which give the largest residuals."""
    assert told(caplog, spec, lambda step, rank: noise(0 if constant else step, rank), 120) == []


def test_a_tensor_that_waits_for_larger_ones_does_not_explode(caplog):
    """global_topk bounds the residual of the whole model alone: a tensor of small gradients may send nothing for a long time."""

    def unlike(step: int, rank: int) -> dict[str, np.ndarray]:
        made = inputs.normal(rank, step, shapes={"large": (64, 64), "small": (40,)})
        return {**made, "small": np.abs(made["small"]) * np.float32(1e-4)}  # one sign, so that it adds up

    assert told(caplog, "global_topk(ratio=0.01) + residual", unlike, 120) == []


def test_the_bound_of_a_residual():
    topk = grace_ext.grace("topk(ratio=0.5) + residual(gamma=2)")
    assert allowed_residual(topk.compressor, topk.memory, 100, 3.0, None) == pytest.approx(2 * 0.5**0.5 / 0.5 * 6)
    dgc = grace_ext.grace("topk(ratio=0.5) + dgc(momentum=0.75)")
    assert allowed_residual(dgc.compressor, dgc.memory, 100, 3.0, None) == pytest.approx(2 * 0.5**0.5 / 0.5 * 12)
    updates = grace_ext.grace("topk(ratio=0.5) + efsignsgd")
    assert updates.memory.in_updates
    assert allowed_residual(updates.compressor, updates.memory, 100, 3.0, 0.1) == pytest.approx(2 * 0.5**0.5 / 0.5 * 0.3)


def test_a_dead_layer(caplog):
    def gradient(step, rank):
        dead, late = np.zeros(300, np.float32), np.full(300, float(step >= 30 and step % 15 == 2), np.float32)
        return {"alive": np.ones(300, np.float32), "dead": dead, "late": late}

    said = told(caplog, "topk + residual", gradient, 29, dead_after=30)
    assert said == []
    said = told(caplog, "topk + residual", gradient, 90, dead_after=30)
    assert len(said) == 2 and all("dead layer" in sentence and "freeze" in sentence for sentence in said)
    assert "'dead'" in said[0] and "since step 0" in said[0] and "'late'" in said[1]
    # A layer that is used now and then is not dead.
    seldom = lambda step, rank: {"w": np.full(300, float(step % 7 == 3), np.float32)}  # noqa: E731
    assert told(caplog, "topk + residual", seldom, 60, dead_after=10) == []


class Line(Transport):
    """Simulates two ranks that send the same, on a network with `seconds` per byte."""

    gathers_uneven = True
    rank, size = 0, 2

    def __init__(self, seconds: float):
        self.ops, self.seconds = NUMPY.ops, seconds

    def start(self, collective, name):
        return collective

    def wait(self, handle):
        time.sleep(handle.nbytes * self.seconds)
        return handle.array / handle.divisor if handle.kind == "allreduce" else [handle.array] * 2


@pytest.mark.parametrize(("spec", "seconds", "slower"), [("atomo(rank=2)", 0.0, True), ("topk(ratio=0.01)", 5e-7, False)])
def test_compression_that_costs_more_than_it_saves(caplog, spec, seconds, slower):
    transport = Line(seconds)
    driver = Driver(grace_ext.grace(f"{spec} + none @ allgather"), NUMPY.ops, transport, bucket_bytes=100_000)
    specs = [TensorSpec(f"w{i}", (n, n)) for i, n in enumerate((40, 100, 160))]
    driver.register(specs)
    assert len(driver.buckets) > 1
    Metrics(every=10).attach(driver)
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING, "grace_ext"):
        for _ in range(42):
            handles = {}
            for spec in specs:
                perform(driver.put(spec.name, rng.standard_normal(spec.shape).astype(np.float32)), transport, handles)
            perform(driver.finish(), transport, handles)
    said = [record.message for record in caplog.records]
    assert len(said) == slower and all("slower than none" in sentence and "grace-ext plan" in sentence for sentence in said)
