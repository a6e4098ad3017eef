"""Trains three steps with each of these specs, and compares with a LocalCluster.  shelf_job.py torch|keras SPEC ...

Prints 'SHELF spec ok' for each spec with the same weights on all ranks that also match the cluster's: with the same bits if payloads are
gathered (torch), otherwise to 1e-5 of the largest.
"""

from __future__ import annotations

import importlib
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
FRAMEWORK = sys.argv[1]
hvd = importlib.import_module(f"grace_ext.frameworks.{'torch' if FRAMEWORK == 'torch' else 'tensorflow'}")
warnings.simplefilter("ignore", grace_ext.errors.BiasedCompressorWarning)


def torch_weights(spec: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    import training

    training.STEPS = 3
    return training.train(hvd, grace_ext.grace(spec))[0], training.train_in_cluster(spec, hvd.size())


def keras_weights(spec: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    import keras
    import tensorflow as tf
    import tf_training as problem

    variables = problem.keras_variables()
    optimizer = keras.optimizers.SGD(problem.LR, momentum=problem.momentum_of(spec))
    optimizer = hvd.DistributedOptimizer(optimizer, compression=grace_ext.grace(spec))
    optimizer.build(variables)
    apply = tf.function(lambda gradients: optimizer.apply(gradients, variables))
    for step in range(3):
        apply(problem.gradients_of([v.value for v in variables], hvd.rank(), step))
    names = [v.path for v in variables]
    problem.STEPS = 3
    return {v.path: np.asarray(v.numpy()) for v in variables}, problem.train_in_cluster(spec, hvd.size(), names)


def same(spec: str) -> bool:
    got, expected = (torch_weights if FRAMEWORK == "torch" else keras_weights)(spec)
    exact = FRAMEWORK == "torch" and grace_ext.grace(spec).communicator.name != "allreduce"
    for name, wanted in expected.items():
        close = np.abs(got[name] - wanted).max() <= (0 if exact else 1e-5) * np.abs(wanted).max() if wanted.size else True
        if not close:
            print(f"{spec}: {name} differs by {np.abs(got[name] - wanted).max()}", flush=True)
            return False
    everyone = hvd.allgather_object([w.tobytes() for w in got.values()])
    return all(other == everyone[0] for other in everyone)


hvd.init()
for spec in sys.argv[2:]:
    try:
        held = same(spec)
    except Exception:
        traceback.print_exc()
        held = False
    if all(hvd.allgather_object(held)) and hvd.rank() == 0:
        print(f"SHELF {spec} ok", flush=True)
hvd.shutdown()
