"""Cases on one rank of unmodified Horovod: it does not compress, unless simulate=True, which equals LocalCluster(size=1)."""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd
import numpy as np

import grace_ext
from grace_ext.errors import UnboundError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import assert_same, raises, run_cases  # noqa: E402

SPEC = "topk(ratio=0.05) + residual"
DGC = "topk(ratio=0.05) + dgc(masking=False)"


def trained(simulate, spec=SPEC):
    model = training.make_model()
    inner = training.make_optimizer(model, spec)
    bound = grace_ext.grace(spec).bind(model.named_parameters(), optimizer=inner, simulate=simulate)
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


def case_a_momentum_stays():
    """The weights are those of uncompressed training whose optimizer has the same momentum, up to rounding."""
    got, expected = trained(False, DGC), training.train_in_cluster("none", 1)
    assert all(np.allclose(got[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


def case_without_the_optimizer_a_vote_is_refused():
    model = training.make_model()
    optimizer = training.make_optimizer(model)
    bound = grace_ext.grace("signsgd").bind(model.named_parameters())
    hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=bound)
    raises(UnboundError, "would have no effect", lambda: training.loss_of(model, 0, 0).backward())


hvd.init()
assert hvd.size() == 1
run_cases(hvd, globals())
hvd.shutdown()
