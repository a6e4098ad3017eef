"""Elastic jobs: one of three workers is killed during training, two go on, and a third joins; every engine that can, does."""

from __future__ import annotations

import pytest

from .elastic import kill_and_grow
from .launch import launcher


@pytest.mark.parametrize("spec", ["topk(ratio=0.1) + residual", "powersgd(rank=2) + residual"])
def test_torch_under_horovod(spec, tmp_path):
    horovodrun = launcher("horovodrun", 3)[0]
    seen = kill_and_grow(horovodrun, tmp_path, "elastic_job.py", spec)
    assert (seen["exit"], seen["sizes"], seen["joined"]) == (0, [3, 2, 3], 1), seen
    assert len(seen["weights"]) == 3 and len(set(seen["weights"].values())) == 1
    assert seen["loss_last"] < 0.7 * seen["loss_first"]
    assert "memory of 1 ranks is lost with them" in seen["log"]
