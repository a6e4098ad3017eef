"""Cases of policies in torch on 2 ranks, with the wrapper and with unmodified Horovod. Prints 'CASE name ok' for each case that holds."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import horovod.torch as plain
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import DisagreementError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import policies  # noqa: E402
import training  # noqa: E402
from cases import assert_same, raises, run_cases  # noqa: E402


def wrapped(spec, api=hvd):
    model = training.make_model()
    optimizer, g = training.make_optimizer(model), grace_ext.grace(spec)
    compression = g if api is hvd else g.bind(model.named_parameters())
    return model, api.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        optimizer.step()
    return training.weights_of(model)


def case_every_policy_as_in_the_cluster():
    for spec in policies.SPECS:
        assert_same(train(*wrapped(spec), range(training.STEPS)), training.train_in_cluster(spec, 2))


def case_unmodified_horovod():
    for spec in policies.SPECS:
        assert_same(train(*wrapped(spec, plain), range(training.STEPS)), training.train_in_cluster(spec, 2))


def case_checkpoint_in_the_middle_of_a_schedule():
    """A checkpoint within a schedule restores weights, momentum, memory and policy from a file."""
    for spec in policies.SPECS:
        model, optimizer = wrapped(spec)
        train(model, optimizer, range(5))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file)
        again, resumed = wrapped(spec)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        assert_same(train(model, optimizer, range(5, 12)), train(again, resumed, range(5, 12)))


def case_ranks_at_other_places_of_the_schedule_are_told_apart():
    """If one rank resumes from another step, the agreement raises on all ranks."""
    spec = "warmup(steps=3, then=topk(ratio=0.1) + residual)"
    model, optimizer = wrapped(spec)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    again, resumed = wrapped(spec)
    if hvd.rank() == 1:
        resumed.load_state_dict(saved)
    raises(DisagreementError, "another place of the policy's schedule", lambda: train(again, resumed, range(1)))


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
