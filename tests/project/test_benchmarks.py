"""Tests what the benchmarks compute around a measurement: shapes, thresholds, summaries of ranks, link fits, targets, and the page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib", reason="pip install 'grace_ext[examples]'")
ROOT = Path(__file__).parents[2]
import grace_ext  # noqa: E402
from benchmarks.common import settings, shapes, targets  # noqa: E402
from benchmarks.exchange import cost_model, jobs, systems  # noqa: E402
from benchmarks.levels import hsdp  # noqa: E402
from benchmarks.local_sgd import local_sgd  # noqa: E402
from grace_ext.planning.candidates import completed  # noqa: E402
from grace_ext.planning.cost import Link, allgather, allreduce, alltoall  # noqa: E402
from grace_ext.planning.probe import SIZES, fitted  # noqa: E402


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [("resnet50", 161, 25_557_032), ("bert-base", 199, 109_482_240), ("transformer", 53, 3_356_160)],
)
def test_models_have_the_parameters_that_their_papers_code_has(model, tensors, elements):
    made = shapes.MODELS[model]()
    assert (len(made), shapes.elements(made)) == (tensors, elements)
    assert all(dim > 0 for dims in made.values() for dim in dims)


def test_the_small_transformer_is_torchs_encoder_layers_and_tables():
    import torch

    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024)
    tables, last = 3 * 256 * 256, 2 * 256
    assert 4 * sum(p.numel() for p in layer.parameters()) + tables + last == shapes.elements(shapes.transformer())


def test_a_settled_threshold_keeps_what_it_was_chosen_for():
    """Under long error feedback, with other random numbers than when it was chosen, the threshold keeps the share it was chosen for."""
    model = shapes.tiny()
    threshold, kept = shapes.threshold_for(model, kept=0.02), []
    sigma = np.concatenate([np.full(math.prod(dims), shapes.scales(model)[name]) for name, dims in model.items()])
    residual, generator = np.zeros(len(sigma)), np.random.default_rng(7)
    for step in range(400):
        residual += sigma * generator.standard_normal(len(sigma))
        over = np.abs(residual) >= threshold
        residual[over] = 0
        kept.append(over.mean() if step >= 200 else 0)
    assert np.mean(kept[200:]) == pytest.approx(0.02, rel=0.15)


def test_a_steady_residual_stays_below_the_threshold():
    drawn = shapes.steady_residual(0.5, (100, 100), np.random.default_rng(0))
    assert drawn.dtype == np.float32 and np.abs(drawn).max() <= 0.5
    assert np.abs(drawn).mean() == pytest.approx(0.5 / 3, rel=0.03)  # the mean for the density 1 - |x| / t


def test_every_spec_of_ours_composes_and_names_are_unique():
    every = systems.listed(0.01, grace_path="anywhere", framework="both", quick=False, only=[])
    assert len({system.name for system in every}) == len(every)
    for system in every:
        if system.group in ("ours", "ours-ddp") or system.group == "tensorflow" and system.job["argument"]:
            grace_ext.grace(system.job["argument"])
    assert set(targets.RELATIVE["resnet50/1gbit/2"]) == set(systems.specs(0.01))


def test_a_system_takes_as_long_as_its_slowest_rank():
    rank = {"times": [0.1, 0.3, 0.2], "baselines": [], "warmups": 2, "sent": [10, 30, 20], "digest": "a", "nonzero": 1.0, "finite": True}
    other = {**rank, "times": [0.4, 0.1, 0.1], "digest": "b", "extra_memory": 5}
    seen = jobs.summary([{**rank, "extra_memory": 7}, other])
    assert seen["ms"] == pytest.approx(300) and seen["sent_bytes"] == 20 and seen["extra_memory"] == 7 and not seen["ranks_agree"]
    idle = jobs.summary([{**rank, "extra_memory": 0, "baselines": [0.05, 0.05]}])
    assert idle["ms"] == pytest.approx(150) and idle["with_ddp_ms"] == pytest.approx(200)


def test_a_reason_has_no_folders_and_no_ranks():
    said = '[rank1]:   File "/some/where/x.py", line 1, in f\n[rank1]: IndexError: index 4 of /some/where/y.py\nW0 SIGTERM to Error: x\n'
    assert jobs.why(said) == "IndexError: index 4 of y.py"
    assert jobs.why("nothing of note") == "it says nothing"


def test_a_job_that_fails_and_one_that_hangs(tmp_path):
    python = [sys.executable, "-c"]
    assert jobs.launched([[*python, "raise ValueError(3)"]], tmp_path, 60)[0] == "fails"
    assert jobs.launched([[*python, "import time; time.sleep(60)"]], tmp_path, 1)[0] == "hangs"
    assert jobs.launched([[*python, "pass"]], tmp_path, 60)[0] == "completes"


def test_a_link_is_found_from_plain_collectives():
    link = Link(5e8, latency=2e-4, overhead=3e-3)
    kinds = {"allreduce": allreduce, "allgather": allgather}
    points = [(kind, n, size, of(link, n, size)) for kind, of in kinds.items() for n in (2, 4) for size in (4, 65536, 1 << 22)]
    seen = fitted(points)
    assert (seen.overhead, seen.latency, seen.rate) == tuple(pytest.approx(x) for x in (3e-3, 2e-4, 5e8))
    less = fitted([(k, n, b, s - 2.9e-3) for k, n, b, s in points])
    assert min(less.overhead, less.latency) >= 0 and less.rate > 0


def test_a_burst_is_not_taken_for_a_links_rate():
    """A token bucket passes 128 KiB at once after a pause: from 64 KiB alone, a link of 100 Mbit/s would seem to have 200 Mbit/s."""
    link, burst = Link(1e8, latency=1e-4, overhead=1e-3), 128 << 10
    sent = {"allreduce": lambda n, m: 2 * (n - 1) * m / n, "allgather": lambda n, m: (n - 1) * m, "alltoall": lambda n, m: (n - 1) * m / n}
    kinds = {"allreduce": allreduce, "allgather": allgather, "alltoall": alltoall}
    points = [
        (kind, n, m, of(link, n, m) - min(burst, sent[kind](n, m)) * link.beta)
        for kind, of in kinds.items() for n in (2, 4) for m in SIZES
    ]  # fmt: skip
    assert fitted(points).rate == pytest.approx(1e8, rel=0.1)


def test_codecs_are_timed():
    work = cost_model.work_of("topk(ratio=0.1) + residual", shapes.tiny(), None, steps=2)
    assert work.encode + work.decode > 0
    assert cost_model.work_of("threshold(threshold=0.01) + residual", shapes.tiny(), 0.01, steps=1).encode >= 0


def cell(**systems: float | None) -> dict:
    """Returns a cell of ResNet-50 in which the systems took these milliseconds; None means failed."""
    known = {"outcome": "completes", "steps": 3, "sent_bytes": 5e6, "wire_bytes": 4, "extra_memory": 8, "ranks_agree": True, "finite": True}
    failed = {"outcome": "fails", "reason": "e"}
    rows = {
        name: {"group": "grace" if name.startswith("GRACE") else "ours", **({**known, "ms": ms} if ms else failed)}
        for name, ms in systems.items()
    }
    fresh = {"model": "resnet50", "rate": "1gbit", "hosts": 2, "elements": 4, "tensors": 1, "commit": "c", "machine": "m", "date": "d"}
    return {**fresh, "complete": True, "dense_ms": [90.0, 110.0], "systems": rows}


def test_targets_are_beside_what_was_measured():
    systems = {"topk": 11.0, "threshold": 12.0, "fp16": None, "GRACE topk": 176.0, "GRACE randomk": None}
    rows = {row.what: row for row in targets.of_exchange({"cells": {"resnet50/1gbit/2": cell(**systems)}})}
    assert rows["topk / dense Horovod"].measured == pytest.approx(0.11) and rows["topk / dense Horovod"].met
    assert rows["threshold / dense Horovod"].measured == pytest.approx(0.12) and not rows["threshold / dense Horovod"].met
    assert rows["fp16 / dense Horovod"].measured is None and not rows["fp16 / dense Horovod"].met
    assert rows["GRACE topk / topk"].measured == pytest.approx(16) and rows["GRACE topk / topk"].met
    assert "terngrad / dense Horovod" not in rows  # it was not run


def test_the_local_benchmark_measures_every_compressor(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, ROOT / "benchmarks" / "exchange" / "local.py", "--elements", "50000", "--times", "1", "--out", out]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    rows = json.loads(out.read_text())["rows"]
    assert set(settings.SETTINGS) == set(grace_ext.compressors.names())
    assert {row["spec"] for row in rows} == {str(completed(text)) for text in targets.LOCAL} | set(settings.specs())
    assert {row.what.split(":")[0] for row in targets.of_local(rows)} == set(targets.LOCAL)


def test_local_targets_are_beside_what_was_measured():
    asked = [("topk", 5.1, 0.9), ("powersgd(rank=4) + residual", 13.0, 0.0), ("sketch", 50.0, 5.0)]
    rows = targets.of_local([{"asked": text, "elements": 9, "encode": encode, "decode": decode} for text, encode, decode in asked])
    assert [(row.what, row.target, row.met) for row in rows] == [
        ("topk: encode / copy", 5, False), ("topk: decode per rank / copy", 1, True), ("powersgd(rank=4) + residual: all / copy", 14, True)
    ]  # fmt: skip


def test_speedups_pair_the_seeds():
    rows = [
        {"task": "t", "spec": spec, "seed": seed, "seconds": seconds, "reached": reached}
        for spec, seed, seconds, reached in [
            ("dense", 0, 100, True), ("dense", 1, 300, True), ("a", 0, 10, True), ("a", 1, 10, True), ("b", 0, 1, False),
        ]
    ]  # fmt: skip
    assert targets.speedups(rows) == {"a": 20.0, "b": None}
    assert targets.of_accuracy(rows)[0].met


def performance(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/performance.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_page_is_written_from_the_results_that_there_are(tmp_path):
    results, page = tmp_path / "results", tmp_path / "docs" / "performance.md"
    results.mkdir()
    where = ["--results", str(results), "--page", str(page)]
    assert performance(*where, "--check").returncode == 0  # no results, no page
    (results / "exchange.json").write_text(json.dumps({"cells": {"resnet50/1gbit/2": cell(topk=11.0, fp16=None)}}))
    assert performance(*where, "--check").returncode == 1
    assert performance(*where).returncode == 0
    text = page.read_text()
    assert "| topk / dense Horovod | resnet50/1gbit/2 | at most 0.12 | 0.11 | yes |" in text
    assert "| fp16 | fails: e |" in text and "| topk | 11 | 0.11 | 5 | 0.5 | 3 |" in text and "commit c" in text
    assert "## More workers" not in text and "## Time to the same accuracy" not in text
    assert (page.parent / "pictures" / "exchange-resnet50-2.png").stat().st_size > 1000
    assert performance(*where, "--check").returncode == 0
    page.write_text(text.replace("0.11", "0.01"))
    assert performance(*where, "--check").returncode == 1


def test_when_a_loss_was_reached():
    """seconds_to returns the first time at or below the target, apart from a single low value, and None if there is none."""
    curve = [[1.0, 0.9], [2.0, 0.3], [3.0, 0.9], [4.0, 0.9], [5.0, 0.5], [6.0, 0.4], [7.0, 0.2], [8.0, 0.6]]
    assert local_sgd.seconds_to(curve, 0.5) == 5.0
    assert local_sgd.seconds_to(curve, 0.1) is None


def test_the_page_of_local_steps_says_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "local_sgd.json").read_text())
    page = (ROOT / "docs" / "local.md").read_text()
    for row in measured["accuracy"]["rows"]:
        assert f"| {row['accuracy']:.2f} % | {row['bytes_per_step']:,.1f} | {row['times_smaller']:,.0f} |" in page
    for row in measured["straggler"]["rows"]:
        assert f"| {row['seconds_to_target']:.1f} s |" in page
    assert f"{measured['straggler']['faster']:.1f} times" in page


def test_the_page_of_fsdp_says_what_was_measured():
    """The page shows the step, its ratio and the bytes of each system; the compressed ones reach the goal."""
    (measured,) = json.loads(hsdp.OUT.read_text()).values()
    page = (ROOT / "docs" / "fsdp.md").read_text()
    for name, row in measured["rows"].items():
        assert f"| {row['step_ms']:,.0f} ms | {round(row['ratio'], 3):g} |" in page, name
        assert row["steps"] == measured["steps"] == len(row["all_ms"])
        if name in ("topk", "powersgd"):
            assert row["ratio"] <= hsdp.GOAL and measured["elements"] > 10_000_000
            assert f"| {row['sent_bytes'] / 1e6:.2f} MB |" in page
            assert row["wire_bytes"] * 2 < row["sent_bytes"] < row["wire_bytes"] * 2.1  # two ranks per host, and headers
