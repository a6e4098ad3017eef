"""What the jobs of the trainers share: a model that keeps what it was fed with, and the same training in a LocalCluster."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import grace_ext

SPECS = ("topk(ratio=0.1) + residual", "powersgd(rank=2) + residual")


class Fed(torch.nn.Module):
    """A small network that returns its loss, and keeps the batches of its training passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4)]
        self.net = torch.nn.Sequential(*layers)
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x, labels):
        if self.training:
            self.batches.append((x.clone(), labels.clone()))
        return {"loss": (self.net(x) - labels).square().mean()}


class Points(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = torch.randn(16, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": torch.sin(2 * x[:4])}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def shared_folder() -> Path:
    """Returns a new folder, the same on all ranks."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return Path(made[0])


def on_rank_0(action) -> None:
    """Calls this on rank 0, while the other ranks wait."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def weights_of(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def in_cluster(g, batches, make_optimizer, passes=1, clip=None, prefix=""):
    """Trains with the batches that this rank's model was fed with, and those of the other ranks, in this process. Returns the weights and
    the bytes that this rank sends at each step. prefix: what the names of the parameters begin with; PowerSGD draws its first Q by name."""
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, batches)
    weights, sent = replayed(g, every, make_optimizer, passes, clip, prefix)
    return weights, [of_all[dist.get_rank()] for of_all in sent]


def replayed(g, every, make_optimizer, passes=1, clip=None, prefix=""):
    """Trains with these batches of every rank. Returns the weights and, for each step, the bytes that every rank sends."""
    model = Fed().eval()  # which keeps no batches
    cluster = grace_ext.LocalCluster(grace_ext.grace(g), len(every), framework="torch")
    optimizer, parameters, sent = make_optimizer(model), {prefix + n: p for n, p in model.named_parameters()}, []
    for step in range(len(every[0]) // passes):
        by_rank = []
        for fed in every:
            model.zero_grad()
            for x, labels in fed[passes * step : passes * (step + 1)]:
                (model(x, labels)["loss"] / passes).backward()
            by_rank.append({name: p.grad.clone() for name, p in parameters.items()})
        for name, mean in cluster.step(by_rank, lr=optimizer.param_groups[0]["lr"]).items():
            parameters[name].grad = mean
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        sent.append(list(cluster.wire_bytes))
    return weights_of(model), sent
