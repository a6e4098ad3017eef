"""Trains a model that FSDP2 shards inside each node, with compressed gradients between the nodes.

    torchrun --nproc-per-node 4 examples/fsdp_mnist.py --nodes 2        (one machine plays two nodes of two ranks)
"""

from __future__ import annotations

import argparse

import mnist
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from grace_ext.frameworks.torch import fsdp_hook

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--nodes", type=int, default=2)
arguments = parser.parse_args()

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (arguments.nodes, size // arguments.nodes), mesh_dim_names=("replicate", "shard"))
train_x, train_y, test_x, test_y = mnist.load()

model = mnist.make_model()
for layer in model:
    if list(layer.parameters()):
        fully_shard(layer, mesh=mesh["shard"])
fully_shard(model, mesh=mesh["shard"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
state = fsdp_hook(arguments.compression, model, mesh["replicate"], optimizer)  # + this line is all that compression needs

sent, dense = 0, 0
for epoch in range(arguments.epochs):
    for chosen in mnist.batches(len(train_x), rank, size, epoch):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(train_x[chosen]), train_y[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        sent += state.wire_bytes
        dense += sum(4 * p.to_local().numel() for p in model.parameters())
    accuracy = mnist.accuracy(model, test_x, test_y)  # every rank: a forward pass gathers the shards
    if rank == 0:
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}", flush=True)

if rank == 0:
    ratio = f", {dense / sent:.1f} times fewer" if sent else " (one node: nothing is compressed)"
    print(f"rank 0 sent {sent:,} bytes between nodes; the gradients of its shards are {dense:,}{ratio}")
dist.destroy_process_group()
