"""Runs one rank of `local_sgd.py straggler`: makes its steps, and on rank 0 records the training loss. The last rank is slow.

Rank 0 prints a JSON document: every rank's number of steps, and after each of rank 0's synchronizations the seconds since the start and the
loss. The loss is that of rank 0's model on a fixed part of all ranks' images. If asynchronous, the slow rank makes proportionally fewer
steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import torch_mnist  # noqa: E402

BATCH, LR, PROBE = 16, 0.01, 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--slower", type=float, required=True)
    parser.add_argument("--pause", type=float, required=True)
    parser.add_argument("--compression", required=True)
    parser.add_argument("--asynchronous", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    slowness = options.slower if hvd.rank() == hvd.size() - 1 else 1.0
    steps = int(options.steps / slowness) if options.asynchronous else options.steps
    images, labels, *_ = torch_mnist.load()
    torch.manual_seed(0)
    model = torch_mnist.make_model()
    optimizer = hvd.LocalSGD(
        torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), model.named_parameters(), options.compression, every=options.every,
        asynchronous=options.asynchronous, max_ahead=options.steps,
    )  # fmt: skip
    mine, generator = torch.arange(hvd.rank(), torch_mnist.TRAIN, hvd.size()), torch.Generator().manual_seed(hvd.rank())
    curve = []
    hvd.barrier()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        begun = time.perf_counter()
        batch = mine[torch.randint(len(mine), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        time.sleep(max(0.0, options.pause * slowness - (time.perf_counter() - begun)))  # stands for the compute of a larger model
        optimizer.step()
        if hvd.rank() == 0 and step % options.every == 0:
            with torch.no_grad():
                loss = cross_entropy(model(images[:PROBE]), labels[:PROBE]).item()
            curve.append([round(time.perf_counter() - started, 3), round(loss, 5)])
    optimizer.sync()
    counts = hvd.allgather(torch.tensor([steps])).tolist()
    if hvd.rank() == 0:
        print(json.dumps({"asynchronous": options.asynchronous, "steps": counts, "curve": curve}), flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
