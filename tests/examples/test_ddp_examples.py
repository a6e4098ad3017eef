"""The DDP examples run on 2 ranks, and the FSDP2 example on 4. They learn, and send fewer bytes."""

from __future__ import annotations

import importlib.util
import re

import pytest

from ..frameworks.support.launch import ROOT, launcher, run

#: The examples that save checkpoints.
TRAINERS = ("accelerate_mnist", "lightning_mnist", "transformers_mnist")


@pytest.mark.parametrize(
    "name, needs, ranks",
    [("ddp_hook", "torch", 2), ("fsdp_mnist", "torch", 4), *((name, name.removesuffix("_mnist"), 2) for name in TRAINERS)],
)
def test_example(name, needs, ranks, tmp_path):
    for package in (needs, "mlxtend"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install grace_ext[examples,trainers]")
    folder = ["--folder", str(tmp_path)] if name in TRAINERS else []
    said = run([*launcher("torchrun", ranks), str(ROOT / "examples" / f"{name}.py"), "--epochs", "1", *folder])
    assert float(re.findall(r"test accuracy ([\d.]+)", said)[-1]) > 0.3, said
    assert float(re.findall(r"([\d.]+) times fewer", said)[0]) > 50, said
