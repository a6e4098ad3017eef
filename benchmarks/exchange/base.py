"""Code that the torch ranks of exchange.py share: the ranks that a launcher started (World), and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import grace_ext


class HorovodWorld:
    """Connects the ranks that horovodrun started."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        hvd.init()
        self.hvd, self.rank, self.size = hvd, hvd.rank(), hvd.size()

    def barrier(self) -> None:
        self.hvd.barrier()

    def largest(self, value: float) -> float:
        return float(self.hvd.allgather(torch.tensor([value], dtype=torch.float64), name="largest").max())

    def close(self) -> None:
        self.hvd.shutdown()


class DistWorld:
    """Connects the ranks that torchrun started."""

    def __init__(self) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.dist, self.rank, self.size = dist, dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        self.dist.barrier()

    def largest(self, value: float) -> float:
        all_of_them = torch.tensor(value, dtype=torch.float64)
        self.dist.all_reduce(all_of_them, op=self.dist.ReduceOp.MAX)
        return float(all_of_them)

    def close(self) -> None:
        self.dist.destroy_process_group()


class Gradients:
    """Holds parameters of the job's shapes; draws Gaussian gradients of its scales at every step, in new memory as backward() does."""

    has_baseline = False
    warmups, least_warmups = 2, 1

    def __init__(self, job: dict[str, Any], rank: int):
        self.scales = job["scales"]
        self.parameters = {name: torch.nn.Parameter(torch.zeros(dims)) for name, dims in job["shapes"].items()}
        self.generator = torch.Generator().manual_seed(1000 + rank)

    def fresh(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = None
            parameter.grad = torch.empty_like(parameter).normal_(0, self.scales[name], generator=self.generator)

    def exchange(self) -> None:
        raise NotImplementedError

    def baseline(self) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        pass

    def results(self) -> Iterator[np.ndarray]:
        return (parameter.grad.numpy() for parameter in self.parameters.values())

    def facts(self) -> dict[str, Any]:
        return {}


def load_code(spec: str) -> None:
    """Loads the code that torch and grace_ext load on first use (compiled kernels, torch's compiler for every optimizer), so that it does
    not count as memory of the exchange."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    grace_ext.LocalCluster(grace_ext.grace(spec), 1, framework="torch").step([{"matrix": torch.ones(64, 32), "vector": torch.ones(64)}])
