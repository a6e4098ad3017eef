"""The torch wrapper under an MPI launcher: it picks Horovod, whose collectives go over MPI, and trains a LocalCluster's weights."""

from __future__ import annotations

import sys
from pathlib import Path

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.frameworks.torch.engine import ENGINE

sys.path.insert(0, str(Path(__file__).parents[1]))
import training  # noqa: E402
from cases import assert_same, run_cases  # noqa: E402

training.STEPS = 4


def case_horovod_over_mpi():
    assert ENGINE == "horovod" and hvd.mpi_enabled() and hvd.size() == 2


def case_same_weights():
    for spec in ("none", "fp16", "topk(ratio=0.05) + residual", "threshold(threshold=0.01) + residual @ broadcast"):
        model = training.make_model()
        optimizer = training.make_optimizer(model)
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=grace_ext.grace(spec))
        for step in range(training.STEPS):
            optimizer.zero_grad()
            training.loss_of(model, hvd.rank(), step).backward()
            optimizer.step()
        assert_same(training.weights_of(model), training.train_in_cluster(spec, hvd.size()))


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
