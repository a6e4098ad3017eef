"""Cases of 'hierarchical' in TensorFlow's graphs, compared with a LocalCluster with the same nodes.  levels_tf_job.py RANKS_PER_NODE

GRACE_EXT_NODE simulates nodes. Prints 'CASE name ok' for each case that holds on all ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import grace_ext
import grace_ext.frameworks.tensorflow as hvd
from grace_ext.errors import UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tf_training as problem  # noqa: E402
from cases import raises, run_cases  # noqa: E402

tf.config.threading.set_intra_op_parallelism_threads(1)
PER_NODE = int(sys.argv.pop())
TOPK = "topk(ratio=0.1) + residual @ hierarchical"
SPECS = (
    "none @ hierarchical",
    "fp16 @ hierarchical",
    TOPK,
    "threshold(threshold=0.01) + residual @ hierarchical(between=broadcast)",
    "powersgd(rank=2) + residual @ hierarchical",
    "efsignsgd + residual @ hierarchical(between=reduce_scatter(feedback=False))",
    f"every(2, powersgd(rank=2) + residual @ hierarchical, {TOPK})",
)


def assert_as_in_cluster(variables, spec, names):
    expected = problem.train_in_cluster(spec, hvd.size(), names, PER_NODE)
    for v, want in zip(variables, expected.values(), strict=True):
        assert np.abs(v.numpy() - want).max() <= (1e-3 if "fp16" in spec else 1e-5), (spec, np.abs(v.numpy() - want).max())
    mine = np.concatenate([np.asarray(v.numpy()).reshape(-1) for v in variables])
    everyone = hvd.allgather(tf.constant(mine[None])).numpy()
    assert all(other.tobytes() == mine.tobytes() for other in everyone), spec


def case_keras_optimizer_in_one_traced_graph():
    for spec in SPECS:
        variables = problem.keras_variables()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=grace_ext.grace(spec))
        optimizer.build(variables)
        apply, traces = problem.in_a_graph(optimizer, variables)
        for step in range(problem.STEPS):
            apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step))
        assert len(traces) == 1
        assert_as_in_cluster(variables, spec, [v.path for v in variables])


def case_tape_in_eager_code_and_in_graphs():
    for graph in (False, True):
        variables = problem.tf_variables()
        problem.train_by_tape(hvd, variables, grace_ext.grace(TOPK), graph)
        assert_as_in_cluster(variables, TOPK, [v.name for v in variables])


def case_not_finite():
    """If one rank has a NaN, all ranks get NaN, and no state changes."""
    variables = problem.tf_variables()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(problem.LR), compression=grace_ext.grace(TOPK))
    optimizer.build(variables)
    for step in range(2):
        before = optimizer.grace_state_dict()
        gradients = [g.numpy() for g in problem.gradients_of(variables, hvd.rank(), step)]
        if step == 1 and hvd.rank() == hvd.size() - 1:
            gradients[0][2, 3] = np.nan
        optimizer.apply([tf.constant(g) for g in gradients], variables)
        assert np.isnan(variables[0].numpy()).any() == (step == 1)
    after = optimizer.grace_state_dict()["state"]
    assert all(np.array_equal(array, after[key]) for key, array in before["state"].items())


def case_refused_where_there_are_no_groups():
    raises(UnsupportedError, "knows of no nodes", lambda: grace_ext.grace(TOPK).bind(problem.tf_variables()))
    local = hvd.LocalSGD(keras.optimizers.SGD(problem.LR), compression=TOPK, every=2)
    variables = problem.keras_variables()
    local.build(variables)
    given = problem.gradients_of([v.value for v in variables], hvd.rank(), 0)
    raises(UnsupportedError, "LocalSGD has no 'hierarchical'", lambda: local.apply(given, variables))


hvd.init()
os.environ["GRACE_EXT_NODE"] = f"node{hvd.rank() // PER_NODE}"
run_cases(hvd, globals())
hvd.shutdown()
