"""Runs one rank of batch_times.py: times the parts of training batches with several specs, and writes them.

    torchrun ... benchmarks/papers/batch_times_rank.py JOB.json

JOB.json has specs, steps (timed batches per spec) and out, the folder of rank<R>.json. The exchange begins after the whole backward pass,
so that no part runs beside another.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.time_to_accuracy.tasks import MnistCNN, Task  # noqa: E402

WARM_UP = 3
clock = time.perf_counter


def times(task: Task, spec: str, steps: int) -> dict[str, float]:
    """Returns the mean seconds of a batch, of each of its parts, and the bytes that this rank sent."""
    torch.manual_seed(0)
    model = task.make_model()
    parameters, spent = list(model.parameters()), {"forward": 0.0, "backward": 0.0, "update": 0.0}
    optimizer = hvd.DistributedOptimizer(task.make_optimizer(model, task.lr), named_parameters=model.named_parameters(), compression=spec)
    batches = task.batches(0, hvd.rank(), hvd.size())

    def step() -> None:
        begin = clock()
        loss = task.loss(model, next(batches))
        after_forward = clock()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):  # calls no hooks
            parameter.grad = gradient
        after_backward = clock()
        optimizer.synchronize()
        before_update = clock()
        with optimizer.skip_synchronize():
            optimizer.step()
        spent["forward"] += after_forward - begin
        spent["backward"] += after_backward - after_forward
        spent["update"] += clock() - before_update

    for _ in range(WARM_UP):
        step()
    optimizer.measure(every=10**6)
    step()  # measures closely, and the network: not part of the means
    spent.update(dict.fromkeys(spent, 0.0))
    hvd.barrier()
    begin = clock()
    for _ in range(steps):
        step()
    whole, total = clock() - begin, optimizer.metrics()["total"]
    parts = {"encode": total["encode_seconds"], "exchange": total["communicate_seconds"], "decode": total["decode_seconds"]}
    return {**{part: seconds / steps for part, seconds in spent.items()}, **parts, "batch": whole / steps, "bytes": optimizer.wire_bytes}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    hvd.init()
    task = MnistCNN()
    found = {spec: times(task, spec, job["steps"]) for spec in job["specs"]}
    (Path(job["out"]) / f"rank{hvd.rank()}.json").write_text(json.dumps(found))
    hvd.barrier()
    hvd.shutdown()


if __name__ == "__main__":
    main()
