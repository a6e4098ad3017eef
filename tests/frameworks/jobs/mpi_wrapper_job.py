"""Cases of a wrapper under an MPI launcher: Horovod's collectives use MPI, and training gives the weights of a LocalCluster.

mpi_wrapper_job.py torch | tensorflow
"""

from __future__ import annotations

import sys
from pathlib import Path

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import assert_same, run_cases  # noqa: E402

FRAMEWORK = sys.argv.pop(1)  # run_cases would take it for the name of a case
if FRAMEWORK == "torch":
    import training

    import grace_ext.frameworks.torch as hvd
else:
    import tf_training as training

    import grace_ext.frameworks.tensorflow as hvd

training.STEPS = 4


def case_horovod_over_mpi():
    assert hvd.mpi_enabled() and not hvd.gloo_enabled() and hvd.size() == 2
    if FRAMEWORK == "torch":
        from grace_ext.frameworks.torch.engine import ENGINE

        assert ENGINE == "horovod"


def case_same_weights():
    for spec in ("none", "fp16", "topk(ratio=0.05) + residual", "threshold(threshold=0.01) + residual @ broadcast"):
        weights, _ = training.train(hvd, grace_ext.grace(spec))
        assert_same(weights, training.train_in_cluster(spec, hvd.size()))


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
