"""The exchange benchmark runs with two real ranks on this machine, by horovodrun and by torchrun, on tiny gradients."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from ..frameworks.support.launch import ROOT, launcher, run


def test_a_cell_on_this_machine(tmp_path):
    launcher("horovodrun", 2)  # skips if it is not installed
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed; pip install grace_ext[examples]")
    out = tmp_path / "exchange.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "exchange" / "exchange.py"), "--local", "--model", "tiny", "--budget", "0.5"]
    run([*command, "--only", "topk", "--only", "threshold", "--out", str(out)], timeout=600)
    cell = json.loads(out.read_text())["cells"]["tiny/local/2"]
    seen = cell["systems"]
    assert cell["complete"] and len(cell["dense_ms"]) == 2
    assert list(seen) == ["Horovod", "threshold", "topk", "DDP hook topk"]
    for name, system in seen.items():
        assert system["outcome"] == "completes" and system["ranks_agree"] and system["finite"], (name, system)
        assert system["ms"] > 0 and system["steps"] >= 1
    assert seen["Horovod"]["nonzero"] == 1.0
    # each of two ranks picks 1% of each tensor, at least one element, so a little over 1% to 2% of the mean is not zero
    assert 0.009 < seen["topk"]["nonzero"] < 0.025 and 0.009 < seen["DDP hook topk"]["nonzero"] < 0.025
    assert 0.002 < seen["threshold"]["nonzero"] < 0.06  # a settled threshold sends about 1% per rank
    assert seen["topk"]["wire_bytes"] < 600 < cell["elements"]
