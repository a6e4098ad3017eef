"""Runs benchmarks/reliability/soak.py for a short time: four real ranks, many specs."""

from __future__ import annotations

import json
import sys

from .support.launch import ROOT, launcher, run


def test_ranks_stay_the_same_and_residuals_bounded(tmp_path):
    launcher("mpirun", 4)  # skips if it is not installed
    out = tmp_path / "ranks.json"
    run([sys.executable, str(ROOT / "benchmarks/reliability/soak.py"), "--steps", "300", "--json", str(out)], 300)
    ranks = json.loads(out.read_text())
    assert len(ranks) == 4 and len({seen["digest"] for seen in ranks}) == 1
    for seen in ranks:
        assert seen["finite"] and seen["steps"] == 300
        assert 0 < seen["worst_ratio"] < 1, seen
        assert seen["last"] - seen["first"] < 8 * 2**20, seen
