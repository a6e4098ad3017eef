"""A type checker accepts the code of the README and the docs, and knows what the wrapped optimizers and exchanges have.

Each snippet becomes a function whose parameters are the names that the page leaves to its reader, with the types that readers have."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="pip install 'grace_ext[dev]'")
pytest.importorskip("torch", reason="pip install 'grace_ext[torch]'")

ROOT = Path(__file__).parents[2]
#: Types of the names that snippets leave to the reader.
NAMES = {
    "model": "torch.nn.Module",
    "optimizer": "torch.optim.Optimizer",
    "opt": "torch.optim.Optimizer",
    "g": "grace_ext.Grace",
    "gradient": "np.ndarray",
    "gradients": "list[np.ndarray]",
    "loss_of": "Any",
    "batch": "Any",
    "step": "int",
    "steps": "int",
    "inputs": "torch.Tensor",
    "targets": "torch.Tensor",
    "w": "np.ndarray",
    "exchange": "gnp.Exchange",
    "tape": "Any",
    "variables": "Any",
    "keras": "Any",
    "tf": "Any",
    "folder": "Path",
    "accelerator": "Any",
    "loader": "Any",
    "state": "Any",
}
HEAD = """
from pathlib import Path
from typing import Any
import numpy as np
import torch
import grace_ext
import grace_ext.frameworks.numpy as gnp
"""
#: The checker's settings. To follow the imports of the trainers takes minutes.
SETTINGS = """[mypy]
[mypy-accelerate.*,lightning.*,ray.*,torchft.*,transformers.*]
follow_imports = skip
"""
TORCH, TENSORFLOW = "import grace_ext.frameworks.torch as hvd", "import grace_ext.frameworks.tensorflow as hvd"
#: Pages without code for a checker: two columns side by side, and plug-ins, whose files the plug-in's own tests run.
OTHERS = {"porting-from-grace.md"}
#: What the results of the public functions have, beyond what the pages show.
RESULTS = """
def wrapped(model: torch.nn.Module, plain: torch.optim.Optimizer) -> None:
    import grace_ext.frameworks.torch as hvd
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), compression="topk + residual")
    bytes_sent: int = optimizer.wire_bytes
    state: dict[str, Any] = optimizer.state_dict()
    report: dict[str, Any] = optimizer.metrics()
    groups = optimizer.param_groups
    with optimizer.skip_synchronize():
        optimizer.step()
    local = hvd.LocalSGD(plain, model.named_parameters(), compression="topk + residual", every=8)
    local.sync()
    exchange = gnp.Exchange("topk + residual")
    mean: np.ndarray = exchange.step({"w": np.ones(3, np.float32)})["w"]
    spec: str = str(grace_ext.grace("topk"))
"""
WRONG = """
def wrong(model: torch.nn.Module, plain: torch.optim.Optimizer) -> None:
    import grace_ext.frameworks.torch as hvd
    hvd.DistributedOptimizer(plain, model.named_parameters(), compression="topk").no_such_attribute
    gnp.Exchange("topk").no_such_method()
"""


def snippets() -> dict[str, str]:
    """Returns the Python code of README and docs, by a name that says where it stands."""
    found = {}
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        if page.name not in OTHERS:
            for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)):
                found[f"{page.stem.replace('-', '_')}_{number}"] = code
    return found


def as_function(name: str, code: str) -> str:
    tensorflow = re.search(r"keras\.|tf\.|tape\b|callbacks", code) is not None
    engine = "" if "frameworks." in code and " as hvd" in code else TENSORFLOW if tensorflow else TORCH
    names = {n: kind for n, kind in NAMES.items() if re.search(rf"\b{n}\b", code) and not (tensorflow and kind.startswith("torch"))}
    if tensorflow:
        names |= dict.fromkeys(("model", "optimizer", "inputs", "targets"), "Any")
    body = "\n".join(["import grace_ext", *([engine] if engine else []), code])
    return f"def {name}({', '.join(f'{n}: {kind}' for n, kind in names.items())}) -> None:\n{textwrap.indent(body, '    ')}\n"


def checked(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "snippets.py"
    file.write_text(text)
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS)
    options = ["--ignore-missing-imports", "--no-error-summary", "--config-file", str(settings), "--python-version", "3.12"]
    return subprocess.run([sys.executable, "-m", "mypy", *options, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_a_checker_accepts_the_snippets(tmp_path):
    functions = [as_function(name, code) for name, code in snippets().items()]
    assert len(functions) > 12
    done = checked(tmp_path, "\n".join([HEAD, *functions, RESULTS]))
    assert done.returncode == 0, done.stdout


def test_a_checker_finds_what_is_wrong(tmp_path):
    """The results are not Any: a misspelt attribute is an error."""
    done = checked(tmp_path, HEAD + WRONG)
    assert len(re.findall(r"has no attribute", done.stdout)) == 2, done.stdout
