"""Cases on one rank of unmodified Horovod: it does not compress, unless simulate=True, which equals LocalCluster(size=1)."""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import assert_same, run_cases  # noqa: E402

SPEC = "topk(ratio=0.05) + residual"


def trained(simulate):
    model = training.make_model()
    inner = training.make_optimizer(model)
    bound = grace_ext.grace(SPEC).bind(model.named_parameters(), optimizer=inner, simulate=simulate)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=bound)
    for step in range(training.STEPS):
        optimizer.zero_grad()
        training.loss_of(model, 0, step).backward()
        optimizer.step()
    return training.weights_of(model)


def case_simulate():
    assert_same(trained(simulate=True), training.train_in_cluster(SPEC, 1))


def case_no_compression_at_size_one():
    assert_same(trained(simulate=False), training.train_in_cluster("none", 1))


hvd.init()
assert hvd.size() == 1
run_cases(hvd, globals())
hvd.shutdown()
