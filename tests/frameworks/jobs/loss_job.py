"""Prints the loss of every step of the small training, or the time of an all-reduce.  loss_job.py wrapper | exchange | time BYTES

    LOSS spec step loss      the mean over ranks, all digits (float.hex), for each of SPECS; by the wrapper of this launcher's engine,
                             or by Exchange over mpi4py
    SECONDS s                the median all-reduce of that many bytes
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[1]))
import training  # noqa: E402

# Gathered payloads, and a sum of two ranks: both give the same bits whatever the network.
SPECS = ("none", "topk(ratio=0.05) + residual", "qsgd(bits=4)")
Step = Callable[[], object]


def losses(model: torch.nn.Module, rank: int, clear: Step, update: Step) -> list[float]:
    """This rank's loss at every step."""
    seen = []
    for step in range(training.STEPS):
        clear()
        loss = training.loss_of(model, rank, step)
        loss.backward()
        update()
        seen.append(loss.item())
    return seen


def by_wrapper(spec: str) -> list[list[float]] | None:
    """Every rank's losses; None on ranks other than the first."""
    import grace_ext.frameworks.torch as hvd

    hvd.init()
    model = training.make_model()
    named, g = model.named_parameters(), grace_ext.grace(spec)
    optimizer = hvd.DistributedOptimizer(training.make_optimizer(model), named_parameters=named, compression=g)
    everyone = hvd.allgather_object(losses(model, hvd.rank(), optimizer.zero_grad, optimizer.step))
    return everyone if hvd.rank() == 0 else None


def by_exchange(spec: str) -> list[list[float]] | None:
    from mpi4py import MPI

    from grace_ext.frameworks.numpy import Exchange

    model = training.make_model()
    optimizer = training.make_optimizer(model)
    with Exchange(spec) as exchange:

        def update() -> None:
            gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
            mean = exchange.step({name: gradient.numpy() for name, gradient in gradients.items()}, lr=0.05)
            for name, p in model.named_parameters():
                p.grad = torch.from_numpy(mean[name])
            optimizer.step()

        return MPI.COMM_WORLD.gather(losses(model, MPI.COMM_WORLD.Get_rank(), optimizer.zero_grad, update))


def print_curves(by: Callable[[str], list[list[float]] | None]) -> None:
    for spec in SPECS:
        everyone = by(spec)
        for step, of_ranks in enumerate(zip(*everyone or (), strict=True)):
            print(f"LOSS {spec!r} {step} {(sum(of_ranks) / len(of_ranks)).hex()}", flush=True)


def print_seconds(size: int, times: int = 3) -> None:
    import grace_ext.frameworks.torch as hvd

    hvd.init()
    x = torch.ones(size // 4)
    hvd.allreduce(x, name="warm-up")
    taken = []
    for i in range(times):
        hvd.barrier()
        begun = time.perf_counter()
        hvd.allreduce(x, name=f"timed{i}")
        taken.append(time.perf_counter() - begun)
    if hvd.rank() == 0:
        print(f"SECONDS {sorted(taken)[times // 2]}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "time":
        print_seconds(int(sys.argv[2]))
    else:
        print_curves({"wrapper": by_wrapper, "exchange": by_exchange}[sys.argv[1]])
