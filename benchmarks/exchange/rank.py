"""Runs one torch rank of exchange.py; horovodrun or torchrun starts it with a job file.  rank.py JOB.json

The job names a system (systems.py) and gives shapes, scales and a time budget; the rank writes its measurements to rank<R>.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import shapes, timing
from benchmarks.exchange.base import DistWorld, Gradients, HorovodWorld, load_code


class Horovod(Gradients):
    """Exchanges as Horovod's own DistributedOptimizer does: each gradient separately, in the order of the backward pass, in place."""

    def __init__(self, job: dict[str, Any], world: HorovodWorld):
        super().__init__(job, world.rank)
        self.hvd = world.hvd
        self.compression = getattr(world.hvd.Compression, job["argument"])

    def exchange(self) -> None:
        started = []
        for name, parameter in reversed(self.parameters.items()):
            sent, context = self.compression.compress(parameter.grad)
            started.append((parameter, self.hvd.allreduce_async_(sent, name=name, op=self.hvd.Average), context))
        for parameter, handle, context in started:
            parameter.grad.set_(self.compression.decompress(self.hvd.synchronize(handle), context))


class Ours(Gradients):
    """Exchanges by grace_ext's DistributedOptimizer over Horovod; the gradients are put into .grad."""

    def __init__(self, job: dict[str, Any], world: HorovodWorld):
        import grace_ext.frameworks.torch as hvd

        super().__init__(job, world.rank)
        self.hvd, self.job, self.rank = hvd, job, world.rank
        hvd.init()
        load_code(job["argument"])

    def make(self) -> None:
        g = grace_ext.grace(self.job["argument"])
        sgd = torch.optim.SGD(self.parameters.values(), lr=0.1)
        self.optimizer = self.hvd.DistributedOptimizer(sgd, named_parameters=self.parameters.items(), compression=g)

    def exchange(self) -> None:
        self.optimizer.synchronize()

    def settle(self) -> None:
        if "threshold" in self.job:
            saved = self.optimizer.state_dict()
            replace_residuals(saved["grace_ext"]["state"], "residual/", self.job, self.rank)
            self.optimizer.load_state_dict(saved)

    def facts(self) -> dict[str, Any]:
        return {"wire_bytes": self.optimizer.wire_bytes}


class GraceDL(Gradients):
    """Exchanges by GRACE (sands-lab/grace) as its patched Horovod optimizer does: all gradients by send_step, then all by receive_step."""

    def __init__(self, job: dict[str, Any], world: HorovodWorld):
        super().__init__(job, world.rank)
        self.job, self.rank = job, world.rank
        warnings.filterwarnings("ignore")
        sys.path.insert(0, job["grace"])
        from grace_dl.torch.helper import grace_from_params

        self.grace = grace_from_params(job["params"])  # allocates nothing yet

    def exchange(self) -> None:
        backward = list(reversed(self.parameters.items()))
        sent = [(parameter, *self.grace.send_step(parameter.grad, name)) for name, parameter in backward]
        for parameter, handles, context in sent:
            parameter.grad.set_(self.grace.receive_step(handles, context))

    def settle(self) -> None:
        if "threshold" in self.job:
            replace_residuals(self.grace.memory.residuals, "", self.job, self.rank)


def replace_residuals(held: dict[str, torch.Tensor], prefix: str, job: dict[str, Any], rank: int) -> None:
    """Replaces a memory's residuals after one step by those that a threshold leaves after long training (shapes.steady_residual)."""
    generator = np.random.default_rng(2000 + rank)
    for name, dims in job["shapes"].items():
        old = held[prefix + name]
        held[prefix + name] = torch.from_numpy(shapes.steady_residual(job["threshold"], tuple(dims), generator)).reshape(old.shape)


def links(repeats: int = 7) -> list[tuple[str, int, int, float]]:
    """Times plain collectives of several sizes for the cost model, on grace_ext's transport. Returns probe.Points."""
    from grace_ext.exchange.perform import perform
    from grace_ext.frameworks.torch import engine
    from grace_ext.frameworks.torch.devices import ops_for
    from grace_ext.planning.probe import Probe

    engine.api.init()
    transport = engine.transport(ops_for(torch.device("cpu")), engine.api.global_process_set)
    return list(perform(Probe(transport).collectives(repeats=repeats), transport, {}).points)


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    group = job["group"]
    world = DistWorld() if "ddp" in group else HorovodWorld()
    if group == "links":
        seen: dict[str, Any] = {"collectives": links()}
    else:
        if "ddp" in group:
            from benchmarks.exchange.ddp import DDP as kind
        else:
            kind = {"horovod": Horovod, "ours": Ours, "grace": GraceDL}[group]
        system = kind(job, world)
        system.fresh()
        before = timing.trimmed()
        if hasattr(system, "make"):
            system.make()
        seen = timing.run(world, system, before=before, budget=job["budget"])
    (Path(job["out"]) / f"rank{world.rank}.json").write_text(json.dumps(seen))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main()
