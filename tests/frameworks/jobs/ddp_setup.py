"""Code that ddp_job.py and ddp_use_job.py share: models, DDP with our hook, and the LocalCluster to compare with."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import grace_ext
import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import policies as policies  # noqa: E402
import training as training  # noqa: E402
from cases import assert_same as assert_same  # noqa: E402
from cases import raises as raises  # noqa: E402
from cases import run_cases as run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
POWERSGD = "powersgd(rank=4) + residual @ allreduce"
EACH_ALONE = 1e-6  # bucket_cap_mb that gives every parameter its own bucket


class Layers(torch.nn.Module):
    """Eight layers without bias; `uses` selects those that a rank uses in a step."""

    def __init__(self, width=24, count=8):
        super().__init__()
        torch.manual_seed(11)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x, uses=None):
        for i in range(len(self.parts)) if uses is None else uses:
            x = x + torch.tanh(self.parts[i](x))
        return x


def layers_loss(model, rank, step, uses=None):
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(x, uses).square().mean()


def used(rank, step):
    """Returns the layers that this rank uses in this step; in steps 2 and 5, no rank uses some of them."""
    return [[0, 1, 2, 3, 4, 5, 6, 7], [5, 0, 3]][(rank + step) % 2] if step not in (2, 5) else [rank + 1, 4]


def without_unused():
    model = training.make_model()
    del model._parameters["unused"]
    return model


def weights_of(model):
    return {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def wrap(model, g=TOPK, bucket_cap_mb=EACH_ALONE, simulate=False, **options):
    """Returns a DDP with our hook, the hook's state, and a list that gets (index, is_last, buckets under way) at every call of the hook."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, **options)
    state, hook = hvd.ddp_comm_hook(g, ddp, simulate=simulate)
    calls = []

    def watched(state, bucket):
        future = hook(state, bucket)
        calls.append((bucket.index(), bucket.is_last(), state._made.driver._next if state._made else 0))
        return future

    ddp.register_comm_hook(state, watched)
    return ddp, state, calls


def train(ddp, loss, steps, optimizer=None, passes=1, set_to_none=True):
    optimizer = optimizer or sgd(ddp.module)
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        for i in range(passes):
            with contextlib.nullcontext() if i == passes - 1 else ddp.no_sync():
                loss(ddp, hvd.rank(), passes * step + i).backward()
        optimizer.step()
    return weights_of(ddp.module)


def in_cluster(make, loss, steps, g=TOPK, make_optimizer=sgd, passes=1):
    """Trains the same with both ranks in this process. Returns the reference weights and the cluster's bytes."""
    cluster, model = grace_ext.LocalCluster(grace_ext.grace(g), 2, framework="torch"), make()
    optimizer, parameters = make_optimizer(model), dict(model.named_parameters())
    for step in steps:
        by_rank = []
        for rank in range(2):
            model.zero_grad()
            for i in range(passes):
                loss(model, rank, passes * step + i).backward()
            by_rank.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()})
        for name, mean in cluster.step(by_rank, lr=0.05).items():
            parameters[name].grad = mean
        optimizer.step()
    return weights_of(model), cluster.wire_bytes
