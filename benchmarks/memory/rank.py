"""Runs one rank of memory.py: measures how much more memory a training step takes if gradients are compressed.

    horovodrun --gloo -np 2 python benchmarks/memory/rank.py SPEC MODEL STEPS FILE

SPEC: a spec, or 'dense' for the engine's own optimizer. MODEL: a set of shapes (shapes.py), or megabytes of gradients. Rank 0 writes the
results of all ranks to FILE. Runs under torchrun, too.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common.shapes import MODELS, Shapes
from benchmarks.common.timing import forget_peak, give_back_at_once, memory, trimmed

#: Steps without an exchange; steps with one before anything is compared; how many times the resident memory is noted afterwards.
PLAIN, SETTLING, NOTES = 5, 10, 50


def shapes_of(model: str) -> Shapes:
    """Returns a named set of shapes, or that many megabytes of gradients in matrices of 4 MB and biases."""
    if model in MODELS:
        return MODELS[model]()
    pairs = [{f"{i}.weight": (1000, 1000), f"{i}.bias": (1000,)} for i in range(int(model) // 4)]
    return {name: shape for pair in pairs for name, shape in pair.items()}


class Given(torch.autograd.Function):
    """Computes a zero loss whose gradient is made in the backward pass: a layer's memory traffic without its computation."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, gradient: Any) -> torch.Tensor:
        ctx.gradient = gradient
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.gradient(), None


class Training:
    """Trains parameters of these shapes; their gradients are different normal numbers at every step and on every rank."""

    def __init__(self, shapes: Shapes):
        self.parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        most = max(map(math.prod, shapes.values()))
        self.pool = torch.randn(most + 65536, generator=torch.Generator().manual_seed(hvd.rank()))
        self.nbytes = 4 * sum(map(math.prod, shapes.values()))
        self.at = 0

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        self.at = (self.at + 7919) % 65536
        return self.pool[self.at : self.at + parameter.numel()].clone().view(parameter.shape)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        sum(Given.apply(p, lambda p=p: self.gradient(p)) for p in self.parameters.values()).backward()
        optimizer.step()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters.values(), lr=1e-6)

    def distributed(self, spec: str) -> torch.optim.Optimizer:
        compression = None if spec == "dense" else spec
        return hvd.DistributedOptimizer(self.optimizer(), named_parameters=self.parameters.items(), compression=compression)


def measure(spec: str, model: str, steps: int) -> dict[str, Any]:
    """Returns bytes. before: resident in the same training without an exchange, all code loaded. The others are beyond `before`: peak
    (VmHWM) and maxrss (getrusage), at any time; steady, after the last step; early and late, the most between steps in the first and the
    last quarter; trimmed, after the C library has returned free memory."""
    bare = trimmed()
    first = Training({"weight": (300, 200), "bias": (300,)})
    optimizer = first.distributed(spec)
    for _ in range(PLAIN):  # a small exchange loads the code: kernels, the engine's threads
        first.step(optimizer)
    code = trimmed() - bare
    training = Training(shapes_of(model))
    plain = training.optimizer()
    for _ in range(PLAIN):
        training.step(plain)
    for parameter in training.parameters.values():  # which moved each rank's own way
        torch.nn.init.zeros_(parameter)
    before = trimmed()
    forget_peak()
    optimizer = training.distributed(spec)
    notes: list[tuple[int, int]] = []
    every = max(1, steps // NOTES)
    for step in range(1, steps + 1):
        training.step(optimizer)
        if step % every == 0:
            notes.append((step, memory() - before))
    settled = [extra for step, extra in notes if step > min(SETTLING, steps // 3)]
    quarter = max(1, len(settled) // 4)
    return {
        "gradients": training.nbytes, "before": before, "code": code, "peak": memory("VmHWM") - before,
        "maxrss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "steady": settled[-1],
        "early": max(settled[:quarter]), "late": max(settled[-quarter:]), "trimmed": trimmed() - before,
    }  # fmt: skip


def main() -> None:
    spec, model, steps, file = sys.argv[1:]
    give_back_at_once()
    hvd.init()
    torch.set_num_threads(1)
    everyone = hvd.allgather_object(measure(spec, model, int(steps)))
    if hvd.rank() == 0:
        Path(file).write_text(json.dumps(everyone))
    hvd.shutdown()


if __name__ == "__main__":
    main()
