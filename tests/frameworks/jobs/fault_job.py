"""Exchanges 4 MB per step, dense, which takes most of the time on a slow link, and logs each step.  fault_job.py HOW FOLDER STEPS

HOW: wrapper or exchange. The file <rank>.txt gets 'PID pid', 'STEP n' per step, and finally 'END digest' or 'ERROR class: text'.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from grace_ext.driver.agreement import digest_of

BY, FOLDER, STEPS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
COUNT = 1_000_000


def by_wrapper():
    import torch

    import grace_ext.frameworks.torch as hvd

    hvd.init()
    weights = torch.nn.Parameter(torch.zeros(COUNT))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weights], lr=0.1), [("weights", weights)], compression="none")

    def step(number):
        optimizer.zero_grad()
        (weights * float(number + hvd.rank())).sum().backward()
        optimizer.step()
        return weights.detach().numpy()

    return hvd.rank(), step


def by_exchange():
    import grace_ext.frameworks.numpy as gnp

    from mpi4py import MPI  # isort: skip

    exchange, weights, rank = gnp.Exchange("none"), np.zeros(COUNT, np.float32), MPI.COMM_WORLD.rank

    def step(number):
        weights[:] -= np.float32(0.1) * exchange.step({"weights": np.full(COUNT, number + rank, np.float32)})["weights"]
        return weights

    return rank, step


rank, step = by_wrapper() if BY == "wrapper" else by_exchange()


def tell(*words):
    with (FOLDER / f"{rank}.txt").open("a") as file:
        print(*words, file=file)


tell("PID", os.getpid())
try:
    for number in range(STEPS):
        weights = step(number)
        tell("STEP", number)
    tell("END", digest_of(weights))
except Exception as error:
    tell("ERROR", f"{type(error).__name__}:", " ".join(str(error).split()))
    raise
