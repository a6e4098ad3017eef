"""Trains under elastic Horovod until `STEPS`, slowly enough that ranks can leave and join. Each rank writes its steps to a file.

arguments: folder, spec, number of steps. A line: 'rank size step loss pid'; at the end 'END rank size digest-of-the-weights'.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

import grace_ext
import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[1]))
import training  # noqa: E402

from grace_ext.frameworks.torch.session import digests_of  # noqa: E402

FOLDER, SPEC, STEPS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def tell(*words):
    with (FOLDER / f"{os.getpid()}.txt").open("a") as file:
        print(*words, file=file)


hvd.init()
model = training.make_model()
if hvd.rank():  # what a new rank starts with must not matter
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(hvd.rank())
inner = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5, weight_decay=0.01)
optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), compression=grace_ext.grace(SPEC))


def loss_now(step):
    """On a fixed few batches, which every rank can learn."""
    return training.loss_of(model, hvd.rank() % 3, step % 4)


@hvd.elastic.run
def train(state):
    tell("BEGIN", hvd.rank(), hvd.size(), state.step, os.getpid())
    hvd.check_agreement(optimizer, model)
    while state.step < STEPS:
        optimizer.zero_grad()
        loss = loss_now(state.step)
        loss.backward()
        optimizer.step()
        state.step += 1
        tell(hvd.rank(), hvd.size(), state.step, loss.item(), os.getpid())
        time.sleep(0.05)
        if state.step % 4 == 0:
            state.commit()
    hvd.check_agreement(optimizer, model)
    weights = sorted(digests_of(model.state_dict()).items())
    tell("END", hvd.rank(), hvd.size(), "-".join(digest for _, digest in weights))


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
hvd.shutdown()
