"""Trains with Hugging Face Accelerate and compressed gradients: one call after `prepare`.

    torchrun --nproc-per-node 2 examples/accelerate_mnist.py        (`accelerate launch --cpu` always starts one process)
"""

from __future__ import annotations

import argparse

import mnist
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from grace_ext.integrations.accelerate import compress

parser = argparse.ArgumentParser(description="Trains on MNIST digits with Accelerate and compressed gradients")
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--folder", default="demo/accelerate", help="where a checkpoint is saved after each epoch; all hosts share it")
parser.add_argument("--resume", action="store_true")
arguments = parser.parse_args()

torch.set_num_threads(1)
data = DataLoaderConfiguration(use_seedable_sampler=True)  # with set_epoch a resumed job gets the batches that it would have got
accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=data)
train_x, train_y, test_x, test_y = mnist.load()
torch.manual_seed(0)
loader = DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True, drop_last=True)
model = mnist.make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.epochs)
accelerator.register_for_checkpointing(schedule)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
state = compress(accelerator, arguments.compression, model, optimizer)  # + all that compression needs
if arguments.resume:
    accelerator.load_state(arguments.folder)

sent, dense = 0, 0
for epoch in range(schedule.last_epoch, arguments.epochs):
    loader.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        sent += state.wire_bytes
        dense += sum(4 * p.numel() for p in model.parameters())
    schedule.step()
    bare = accelerator.unwrap_model(model)
    reached = mnist.accuracy(bare, test_x.to(accelerator.device), test_y.to(accelerator.device))
    accelerator.print(f"epoch {epoch + 1}: test accuracy {reached:.3f}", flush=True)
    accelerator.save_state(arguments.folder)  # the model, the optimizer, and every rank's memory

ratio = f", {dense / sent:.1f} times fewer" if sent else " (one rank: nothing is compressed)"
accelerator.print(f"sent {sent:,} bytes; dense gradients are {dense:,}{ratio}")
accelerator.end_training()
