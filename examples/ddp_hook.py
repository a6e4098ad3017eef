"""Trains with DistributedDataParallel and compressed gradients.

    torchrun --nproc-per-node 2 examples/ddp_hook.py [--compression "powersgd(rank=4) + residual"]
"""

from __future__ import annotations

import argparse

import mnist
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from grace_ext.frameworks.torch import ddp_comm_hook

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=int, default=3)
arguments = parser.parse_args()

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, size = dist.get_rank(), dist.get_world_size()
train_x, train_y, test_x, test_y = mnist.load()

ddp = DistributedDataParallel(mnist.make_model())
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
state, hook = ddp_comm_hook(arguments.compression, ddp, optimizer)  # +
ddp.register_comm_hook(state, hook)  # + these two lines are all that compression needs

sent, dense = 0, 0
for epoch in range(arguments.epochs):
    for chosen in mnist.batches(len(train_x), rank, size, epoch):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(train_x[chosen]), train_y[chosen])
        loss.backward()
        optimizer.step()
        sent += state.wire_bytes
        dense += sum(4 * p.numel() for p in ddp.parameters())
    if rank == 0:
        print(f"epoch {epoch + 1}: test accuracy {mnist.accuracy(ddp.module, test_x, test_y):.3f}", flush=True)

if rank == 0:
    ratio = f", {dense / sent:.1f} times fewer" if sent else " (one rank: nothing is compressed)"
    print(f"sent {sent:,} bytes; dense gradients are {dense:,}{ratio}")
dist.destroy_process_group()
