"""Exchanges one rank's gradients through DistributedDataParallel, by torch's own hooks and by grace_ext's.

The backward pass computes nothing: it returns given gradients. Steps with the real hook alternate with steps whose hook does nothing.
The latter have all of DDP's own work (copies into buckets and out of them), so the difference is the exchange.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from grace_ext.frameworks.torch import ddp_comm_hook

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.exchange.base import DistWorld, Gradients, load_code


class HandOut(torch.autograd.Function):
    """Computes a zero loss; its backward pass returns the given gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return None, *ctx.gradients


class Model(torch.nn.Module):
    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__()
        self.names = list(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return HandOut.apply(gradients, *self.parameters())


class DDP(Gradients):
    """Exchanges through a DDP hook. job['argument']: dense, fp16 or powersgd (torch's hooks), or in group ours-ddp a spec of grace_ext;
    job['bucket_mb']: the size of buckets, None for DDP's 25 MB."""

    has_baseline = True

    def __init__(self, job: dict[str, Any], world: DistWorld):
        super().__init__(job, world.rank)
        self.job, self.buckets, self.idle = job, set(), False
        self.gradients: list[torch.Tensor] = []
        load_code(job["argument"] if job["group"] == "ours-ddp" else "none")

    def fresh(self) -> None:
        super().fresh()
        self.gradients = [parameter.grad for parameter in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None

    def make(self) -> None:
        self.ddp = DistributedDataParallel(Model(self.parameters), bucket_cap_mb=self.job["bucket_mb"], init_sync=False)
        self.state, hook = self.chosen()

        def switch(state, bucket):
            self.buckets.add((self.idle, bucket.index()))
            if not self.idle:
                return hook(state, bucket)
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        self.ddp.register_comm_hook(self.state, switch)

    def chosen(self) -> tuple[Any, Any]:
        argument = self.job["argument"]
        if self.job["group"] == "ours-ddp":
            return ddp_comm_hook(argument, self.ddp)
        if argument == "powersgd":
            self.warmups, self.least_warmups = 4, 3  # the hook needs two dense steps, and one step that makes its state
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
            return state, powerSGD_hook.powerSGD_hook
        return None, {"dense": default_hooks.allreduce_hook, "fp16": default_hooks.fp16_compress_hook}[argument]

    def exchange(self) -> None:
        loss, self.gradients = self.ddp(self.gradients), []
        self.buckets.clear()
        loss.backward()

    def baseline(self) -> None:
        self.idle = True
        self.exchange()
        self.idle = False

    def facts(self) -> dict[str, Any]:
        known = {"buckets": len(self.buckets)}
        return {**known, "wire_bytes": self.state.wire_bytes} if hasattr(self.state, "wire_bytes") else known
