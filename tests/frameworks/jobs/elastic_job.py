"""Trains under elastic Horovod until the folder has a file `stop`. Each process writes a log to its own file.  elastic_job.py FOLDER SPEC

Lines: 'BEGIN rank size step host', 'STEP rank size step loss time', 'END rank size digests-of-the-weights'.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

import grace_ext
import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402

from grace_ext.frameworks.torch.session import digests_of  # noqa: E402

FOLDER, SPEC = Path(sys.argv[1]), sys.argv[2]


def tell(*words):
    with (FOLDER / f"{os.getpid()}.txt").open("a") as file:
        print(*words, file=file)


hvd.init()
model = training.make_model()
if hvd.rank():  # the initial weights of a new rank must not matter
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(hvd.rank())
inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)
optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=grace_ext.grace(SPEC))


def loss_now(step):
    """Returns the loss on one of four fixed batches, which every rank can learn."""
    return training.loss_of(model, hvd.rank() % 3, step % 4)


def told_to_stop():
    """Whether the folder has the file `stop`; rank 0 looks, and all ranks get its answer."""
    return hvd.broadcast_object((FOLDER / "stop").exists(), name="stop")


@hvd.elastic.run
def train(state):
    tell("BEGIN", hvd.rank(), hvd.size(), state.step, os.environ["HOROVOD_HOSTNAME"])
    hvd.check_agreement(optimizer, model)
    while state.step % 4 or not told_to_stop():
        optimizer.zero_grad()
        loss = loss_now(state.step)
        loss.backward()
        optimizer.step()
        state.step += 1
        tell("STEP", hvd.rank(), hvd.size(), state.step, loss.item(), time.monotonic())
        if state.step % 4 == 0:
            state.commit()
    hvd.check_agreement(optimizer, model)
    tell("END", hvd.rank(), hvd.size(), "-".join(digest.split(":")[1] for digest in digests_of(model.state_dict()).values()))


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
hvd.shutdown()
