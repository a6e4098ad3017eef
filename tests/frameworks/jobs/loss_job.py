"""Prints the loss of every step of a small training, or the time of an all-reduce.

loss_job.py torch | tensorflow | exchange | time BYTES

    LOSS spec step loss      mean over ranks with all digits (float.hex), for each of SPECS; trained by a wrapper over this launcher's
                             engine, or by Exchange over mpi4py
    SECONDS s                median time of an all-reduce of BYTES bytes
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

# Gathered payloads, and sums of two ranks, give the same bits on any network.
SPECS = ("none", "topk(ratio=0.05) + residual", "qsgd(bits=4)")
Curves = Callable[[str], list[list[float]] | None]  # every rank's losses on rank 0; None on other ranks


def by_wrapper(hvd: Any, training: Any) -> Curves:
    hvd.init()

    def curves(spec: str) -> list[list[float]] | None:
        _, losses = training.train(hvd, grace_ext.grace(spec))
        everyone = hvd.allgather_object(losses)
        return everyone if hvd.rank() == 0 else None

    return curves


def by_torch() -> Curves:
    import training

    import grace_ext.frameworks.torch as hvd

    return by_wrapper(hvd, training)


def by_tensorflow() -> Curves:
    import tf_training

    import grace_ext.frameworks.tensorflow as hvd

    return by_wrapper(hvd, tf_training)


def by_exchange() -> Curves:
    import torch
    import training

    from grace_ext.frameworks.numpy import Exchange

    from mpi4py import MPI  # isort: skip

    def curves(spec: str) -> list[list[float]] | None:
        model, losses = training.make_model(), []
        optimizer = training.make_optimizer(model)
        with Exchange(spec) as exchange:
            for step in range(training.STEPS):
                optimizer.zero_grad()
                loss = training.loss_of(model, MPI.COMM_WORLD.rank, step)
                loss.backward()
                gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
                mean = exchange.step({name: gradient.numpy() for name, gradient in gradients.items()}, lr=0.05)
                for name, p in model.named_parameters():
                    p.grad = torch.from_numpy(mean[name])
                optimizer.step()
                losses.append(loss.item())
        return MPI.COMM_WORLD.gather(losses)

    return curves


def print_curves(curves: Curves) -> None:
    for spec in SPECS:
        everyone = curves(spec)
        for step, of_ranks in enumerate(zip(*everyone or (), strict=True)):
            print(f"LOSS {spec!r} {step} {(sum(of_ranks) / len(of_ranks)).hex()}", flush=True)


def print_seconds(size: int, times: int = 3) -> None:
    import torch

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
        print_curves({"torch": by_torch, "tensorflow": by_tensorflow, "exchange": by_exchange}[sys.argv[1]]())
