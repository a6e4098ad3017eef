"""Trains with every spec on this launcher's ranks; rank 0 writes the weights.  parity_job.py {wrapper|bind|plain} OUT.npz"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402

MODE, OUT = sys.argv[1], sys.argv[2]
if MODE == "wrapper":
    import grace_ext.frameworks.torch as hvd
else:
    import horovod.torch as hvd

hvd.init()
weights = {}
for spec in ("none",) if MODE == "plain" else training.SPECS:
    model = training.make_model()
    optimizer, g = training.make_optimizer(model), grace_ext.grace(spec)
    options = {}
    if MODE != "plain":
        options["compression"] = g if MODE == "wrapper" else g.bind(model.named_parameters())
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **options)
    for step in range(training.STEPS):
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        optimizer.step()
    mine = training.weights_of(model)
    digest = torch.from_numpy(np.concatenate([w.reshape(-1) for w in mine.values()]))
    for other in hvd.allgather(digest[None]):
        assert torch.equal(other, digest), f"{spec}: ranks ended with different weights"
    weights.update({f"{spec}|{name}": value for name, value in mine.items()})
if hvd.rank() == 0:
    np.savez(OUT, **weights)
    print("PARITY JOB DONE")
hvd.shutdown()
