"""Cases of `DistributedState` in a plain Python process, without a process group."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import heard, run_cases  # noqa: E402

import grace_ext.frameworks.torch as hvd  # noqa: E402


def trained(simulate, steps):
    model = training.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression="topk(ratio=0.05) + residual", simulate=simulate)
    for step in range(steps):
        optimizer.zero_grad()
        training.loss_of(model, 0, step).backward()
        optimizer.step()
    return optimizer


def case_simulated():
    first, second = trained(True, 5), trained(True, 0)
    with tempfile.TemporaryDirectory() as there:
        dcp.save({"grace_ext": hvd.DistributedState(first)}, checkpoint_id=there)
        dcp.load({"grace_ext": hvd.DistributedState(second)}, checkpoint_id=there)
    expected, found = (optimizer.state_dict()["grace_ext"] for optimizer in (first, second))
    assert found["step"] == expected["step"] == 5 and expected["state"]
    assert all(torch.equal(array, found["state"][key]) for key, array in expected["state"].items())


def case_a_rank_that_exchanges_nothing_says_that_the_memory_is_lost():
    first, second = trained(True, 5), trained(False, 0)
    with tempfile.TemporaryDirectory() as there, heard() as said:
        dcp.save({"grace_ext": hvd.DistributedState(first)}, checkpoint_id=there)
        dcp.load({"grace_ext": hvd.DistributedState(second)}, checkpoint_id=there)
    assert len(said) == 1 and "is not loaded, and is lost" in said[0], said


hvd.init()
run_cases(hvd, globals())
