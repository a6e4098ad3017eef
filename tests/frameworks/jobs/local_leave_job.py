"""Lets a rank leave in the middle of LocalSGD's schedule, to see which error the others get, and when.

local_leave_job.py torch | tensorflow | mpi   synchronous | asynchronous   LEAVER

Prints 'TOLD rank seconds error' on the ranks that stay.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
FRAMEWORK, MODE, LEAVER = sys.argv[1], sys.argv[2], int(sys.argv[3])
OPTIONS: dict[str, Any] = {"every": 4, "asynchronous": MODE == "asynchronous", "timeout": 60.0}


def by_torch() -> Any:
    import grace_ext.frameworks.torch as hvd
    from tests.frameworks.support import training
    from tests.frameworks.support.local_training import make_optimizer, run

    hvd.init()
    model = training.make_model()
    optimizer = hvd.LocalSGD(make_optimizer(model, "none"), model.named_parameters(), **OPTIONS)
    return hvd.rank(), lambda step: run(hvd, model, optimizer, range(step, step + 1))


def by_tensorflow() -> Any:
    import keras

    import grace_ext.frameworks.tensorflow as hvd

    hvd.init()
    variable = keras.Variable(np.zeros(3, np.float32), name="w")
    optimizer = hvd.LocalSGD(keras.optimizers.SGD(0.1), **OPTIONS)
    return hvd.rank(), lambda step: optimizer.apply([np.full(3, 1.0 + step, np.float32)], [variable])


def by_mpi() -> Any:
    import grace_ext.frameworks.numpy as gnp

    from mpi4py import MPI  # isort: skip

    local = gnp.LocalSGD("none", MPI.COMM_WORLD, **OPTIONS)
    model = local.start({"w": np.zeros(3, np.float32)})

    def step(number: int) -> None:
        nonlocal model
        model = local.step({"w": model["w"] - np.float32(0.1 * number)})

    return MPI.COMM_WORLD.rank, step


rank, one_step = {"torch": by_torch, "tensorflow": by_tensorflow, "mpi": by_mpi}[FRAMEWORK]()
begun = time.monotonic()
try:
    for number in range(40):
        if rank == LEAVER and number == 6:
            os._exit(0)
        one_step(number)
        time.sleep(0.02)
except Exception as error:
    print(f"TOLD {rank} {time.monotonic() - begun:.2f} {type(error).__name__} {' '.join(str(error).split())}", flush=True)
os._exit(0)  # because a normal exit of the engine may wait for the rank that left
