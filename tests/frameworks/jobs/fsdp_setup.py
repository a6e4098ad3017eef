"""Code that the jobs fsdp_*.py share: 2 replicas x 2 shards, a sharded model with our hook, and clusters to compare with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.frameworks.torch.guards import local_of

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training as training  # noqa: E402
from cases import raises as raises  # noqa: E402
from cases import run_cases as run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
POWERSGD = "powersgd(rank=2) + residual"

torch.set_num_threads(1)
hvd.init()
assert hvd.size() in (4, 8)  # of 8 ranks, each half has a mesh of its own
MESH = init_device_mesh("cpu", (hvd.size() // 4, 2, 2), mesh_dim_names=("job", "replicate", "shard"))["replicate", "shard"]
REPLICA, SHARD = MESH["replicate"].get_local_rank(), MESH["shard"].get_local_rank()


def make_model() -> nn.Sequential:
    """Returns a model with the same weights in every process. 33 rows are uneven shards; of one row, the second shard is empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 33), nn.Tanh(), nn.Linear(33, 1))


def sharded(model: nn.Module, mesh=None, **options) -> nn.Module:
    """Returns the model after fully_shard of its layers and of itself, over this replica's ranks."""
    mesh = MESH["shard"] if mesh is None else mesh
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.2, **options})


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    """Returns the loss of this rank in this step, on its own data."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
    return (model(x).float() - torch.sin(2 * x[:, :1])).square().mean()


def hooked(g=TOPK, model=None, **options):
    """Returns a sharded model, its optimizer, and the state of its hook."""
    model = sharded(make_model()) if model is None else model
    optimizer = sgd(model)
    return model, optimizer, hvd.fsdp_hook(g, model, MESH["replicate"], optimizer, **options)


def train(model, optimizer, steps, passes=1, loss=loss_of, rank=None):
    for step in steps:
        optimizer.zero_grad()
        for i in range(passes):
            loss(model, hvd.rank() if rank is None else rank, passes * step + i).backward()
        optimizer.step()


def shard_of(tensor: torch.Tensor, shard: int, shards: int, dim: int | None) -> torch.Tensor:
    """Returns the part of a tensor, cut along a dimension, that this shard gets (fully_shard and tensor parallelism cut alike)."""
    if dim is None:
        return tensor.clone()
    size = -(-tensor.shape[dim] // shards)
    first = min(shard * size, tensor.shape[dim])
    return tensor.narrow(dim, first, min(size, tensor.shape[dim] - first)).contiguous()


def in_clusters(
    g=TOPK, steps=range(6), passes=1, loss=loss_of, make=make_model, make_optimizer=sgd, shards=2, data=((0, 1), (2, 3)), dims=None,
    tp=1, tp_dims=None, start=None,
):  # fmt: skip
    """Trains the same without FSDP, with a LocalCluster of the replicas for each shard. Returns the weights, and the bytes by shard and
    replica.

    data: for each replica the ranks whose data it has. dims: by name, the dimension along which a parameter is cut, if it is not the first.
    tp: the ranks of tensor parallelism, which cut the parameters of `tp_dims` before, along these dimensions; the others are whole on each.
    Shards are then in the order of the mesh ('shard', 'tp'). start: the states of the clusters."""
    model, dims, tp_dims = make(), dims or {}, tp_dims or {}
    optimizer, parameters = make_optimizer(model), dict(model.named_parameters())
    places = [(shard, part) for shard in range(shards) for part in range(tp)]
    clusters = [grace_ext.LocalCluster(grace_ext.grace(g), len(data), framework="torch") for _ in places]
    for cluster, state in zip(clusters, start or [], strict=bool(start)):
        cluster.load_state_dict(state)

    def cut(name, x, shard, part):
        return shard_of(shard_of(x, part, tp, tp_dims.get(name)), shard, shards, dims.get(name, 0))

    def joined(name, outs):
        parts = [torch.cat([outs[shard, part][name] for shard in range(shards)], dims.get(name, 0)) for part in range(tp)]
        return torch.cat(parts, tp_dims[name]) if name in tp_dims else parts[0]

    for step in steps:
        means = []
        for ranks in data:
            total = {name: torch.zeros_like(p) for name, p in parameters.items()}
            for rank in ranks:
                model.zero_grad()
                for i in range(passes):
                    loss(model, rank, passes * step + i).backward()
                total = {n: total[n] + p.grad if p.grad is not None else total[n] for n, p in parameters.items()}
            means.append({name: x / len(ranks) for name, x in total.items()})
        outs = {}
        for place, cluster in zip(places, clusters, strict=True):
            outs[place] = cluster.step([{n: cut(n, x, *place) for n, x in mean.items()} for mean in means], lr=0.2)
        for name, parameter in parameters.items():
            parameter.grad = joined(name, outs)
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}, [cluster.wire_bytes for cluster in clusters]


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of all shards. Every rank of the replica calls it."""
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def assert_equal(model: nn.Module, expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """Asserts that this replica has these weights: the same bits, or with a tolerance, relative to the largest weight of a parameter."""
    for name, got in whole(model).items():
        assert got.shape == expected[name].shape, name
        worst = float((got - expected[name]).abs().max() / expected[name].abs().max())
        assert torch.equal(got, expected[name]) if not tolerance else worst <= tolerance, (name, worst)


def memory_of(state) -> dict[str, torch.Tensor]:
    return {key: array.clone() for key, array in state.state_dict()["state"].items()}


def assert_memory(state, expected) -> None:
    now = memory_of(state)
    assert set(now) == set(expected) and all(torch.equal(now[key], expected[key]) for key in expected)


def assert_replicas_equal(model) -> None:
    mine = [local_of(p).detach().tolist() for p in model.parameters()]
    both = [None, None]
    dist.all_gather_object(both, mine, group=MESH["replicate"].get_group())
    assert both[0] == both[1]
