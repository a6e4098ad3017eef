"""Tests what the experiments on privacy, local steps and batch times compute from their runs."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'grace_ext[torch]'")
pytest.importorskip("matplotlib", reason="pip install 'grace_ext[examples]'")
pytest.importorskip("mlxtend", reason="pip install 'grace_ext[privacy]'")
from benchmarks.accuracy import private  # noqa: E402
from benchmarks.papers import batch_times, dp_compression  # noqa: E402
from grace_ext.papers import inversion, qsparse  # noqa: E402


def holds(checks):
    return [check.holds for check in checks]


# --- differential privacy -------------------------------------------------------------------------------------------------
def test_the_conditions_of_the_heat_map():
    cell = lambda accuracy: {"accuracy": accuracy, "accuracies": [accuracy], "bytes": 1}  # noqa: E731
    results = {
        "none": {"inf": cell(88.0), "1": cell(80.0)},
        "topk(ratio=0.01) + residual": {"inf": cell(86.0), "1": cell(76.0)},
        dp_compression.RANDOM: {"inf": cell(70.0), "1": cell(55.0)},
        dp_compression.SUPPORT: {"inf": cell(81.0), "1": cell(64.0)},
    }
    found = dp_compression.judged(results, ["inf", "1"], 3.0)
    assert [check.measured for check in found] == [2.0, 4.0, 9.0]
    assert holds(found) == [True, False, False]


def test_cells_are_trained_once_and_only_kept_for_the_same_settings(monkeypatch, tmp_path):
    trained, shares, out = [], [], tmp_path / "private.json"

    def train(spec, epsilon, seed, data, tick):
        trained.append((spec, epsilon, seed))
        for _ in range(private.STEPS):
            tick()
        return {"accuracy": 80.0 + seed, "bytes": 10, "noise": 1.0}

    monkeypatch.setattr(private, "train", train)
    monkeypatch.setattr(private.mnist, "load", lambda: ())
    private.complete(["none"], [1.0], [0, 1], out, shares.append)
    found = private.complete(["none", "fp16"], [1.0], [0, 1], out, shares.append)
    assert trained == [("none", 1.0, 0), ("none", 1.0, 1), ("fp16", 1.0, 0), ("fp16", 1.0, 1)] and shares[-1] == 1
    assert found["results"]["none"]["1"]["accuracy"] == 80.5
    monkeypatch.setattr(private, "CLIP", 2.0)
    private.complete(["none"], [1.0], [0, 1], out, shares.append)
    assert len(trained) == 6 and list(json.loads(out.read_text())["results"]) == ["none"]


# --- inversion ------------------------------------------------------------------------------------------------------------
def test_the_conditions_of_the_inversion():
    def seen(naive, adaptive, ssim=0.95, labels=1.0):
        return {kind: SimpleNamespace(psnr=psnr, ssim=ssim, labels=labels) for kind, psnr in (("naive", naive), ("adaptive", adaptive))}

    low_rank = "powersgd(rank=1) + residual"
    good = {"lenet": {"none": seen(30, 30), low_rank: seen(6, 23)}, "mlp": {low_rank: seen(100, 100)}}
    assert all(holds(inversion.judged(good)))
    bad = {"lenet": {"none": seen(30, 30, 0.8), low_rank: seen(31, 23, labels=0.75)}, "mlp": {low_rank: seen(50, 50)}}
    assert not any(holds(inversion.judged(bad)))


# --- Qsparse-local-SGD ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def digits():
    return qsparse.Digits()


def test_the_gradient_of_softmax_regression_is_that_of_its_loss(digits):
    generator, rows = np.random.default_rng(0), np.arange(qsparse.TRAIN)
    model = {"weight": 0.01 * generator.standard_normal((784, 10)), "bias": generator.standard_normal(10)}
    gradient, direction = digits.gradient(model, rows), {name: generator.standard_normal(value.shape) for name, value in model.items()}
    moved = [digits.loss({name: value + side * 1e-5 * direction[name] for name, value in model.items()}) for side in (1, -1)]
    assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(sum(float((gradient[n] * direction[n]).sum()) for n in model), rel=1e-5)


def test_asynchronous_ranks_send_as_often_as_synchronous_ones(digits, monkeypatch):
    monkeypatch.setattr(qsparse, "STEPS", 48)
    found = [qsparse.train(digits, qsparse.SPECS["topk > signs"], 8, 0.4, 0, kind) for kind in (False, True)]
    assert [len(one.curve) for one in found] == [6, 6]
    both = [one.curve[-1][0] for one in found]
    assert both[1] == pytest.approx(both[0], rel=0.15)  # of the last step's messages, some ranks' come later
    assert found[0].loss != found[1].loss and all(one.loss < 2.0 for one in found)
    assert found[0].to_target == math.inf or found[0].curve[-1][1] <= qsparse.TARGET
    assert qsparse.Training(0.0, 0.0, [(10, 0.5), (20, 0.4), (30, 0.3)]).to_target == 20
    assert qsparse.spread([1.0, 3.0]) == "2.0 ± 1.0" and qsparse.spread([1.0, math.inf]) == "not reached by 1 of 2"


# --- the parts of a batch -------------------------------------------------------------------------------------------------
def test_the_parts_of_a_batch_are_timed_on_two_ranks():
    specs = ("none", "topk(ratio=0.01) + residual")
    found = batch_times.measured(2, "local", specs, 2)
    assert all(found[spec][part] > 0 for spec in specs for part in (*batch_times.PARTS, "batch"))
    assert all(sum(found[spec][part] for part in batch_times.PARTS) < 1.05 * found[spec]["batch"] for spec in specs)
    assert found["none"]["bytes"] > 40 * found["topk(ratio=0.01) + residual"]["bytes"]
