"""Elastic jobs: one of three workers is killed in training, two continue, a third joins; and torchrun restarts from a checkpoint."""

from __future__ import annotations

import re

import pytest

from grace_ext.cli.check import horovod_built

from .support.elastic import kill_and_grow
from .support.launch import job, launcher

TOPK = "topk(ratio=0.1) + residual"


@pytest.mark.parametrize("file", ["elastic_job.py", "elastic_tf_job.py"])
def test_a_worker_is_killed_and_another_joins(file, tmp_path):
    horovodrun = launcher("horovodrun", 3)[0]
    if file == "elastic_tf_job.py" and "tensorflow" not in horovod_built():
        pytest.skip("Horovod was built without TensorFlow")
    seen = kill_and_grow(horovodrun, tmp_path, file, TOPK)
    assert (seen["exit"], seen["sizes"], seen["joined"]) == (0, [3, 2, 3], 1), seen
    assert len(seen["weights"]) == 3 and len(set(seen["weights"].values())) == 1
    assert seen["loss_last"] < 0.7 * seen["loss_first"]
    assert "memory of 1 ranks is lost with them" in seen["log"]


def test_torchrun_restarts_from_the_checkpoint_bit_for_bit(tmp_path):
    ended = {}
    for name in ("straight", "die"):
        (tmp_path / name).mkdir()
        said = job("torchrun --max-restarts 1", 3, "restart_job.py", str(tmp_path / name), TOPK, *[name] * (name == "die"))
        ended[name] = re.search(r"WEIGHTS (\w+) (\d)", said).groups()
    assert ended == {"straight": (ended["straight"][0], "0"), "die": (ended["straight"][0], "1")}
