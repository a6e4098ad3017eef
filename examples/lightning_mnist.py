"""Trains with Lightning and compressed gradients: DDPStrategy takes the hook and its state, made for the module before it is wrapped.

    torchrun --nproc-per-node 2 examples/lightning_mnist.py
"""

from __future__ import annotations

import argparse
import os

import lightning as L
import mnist
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from grace_ext.frameworks.torch import ddp_comm_hook


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = mnist.make_model()

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Compression(L.Callback):
    """Counts bytes, prints the accuracy, and registers the hook on devices other than CUDA, where DDPStrategy ignores it without a
    warning."""

    def __init__(self, state, hook):
        self.state, self.hook, self.sent, self.dense = state, hook, 0, 0

    def on_fit_start(self, trainer, module):
        if trainer.strategy.root_device.type != "cuda":
            trainer.strategy.model.register_comm_hook(self.state, self.hook)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.sent += self.state.wire_bytes
        self.dense += sum(4 * p.numel() for p in module.parameters())

    def on_train_epoch_end(self, trainer, module):
        if trainer.is_global_zero:
            reached = mnist.accuracy(module.network, test_x.to(module.device), test_y.to(module.device))
            print(f"epoch {trainer.current_epoch + 1}: test accuracy {reached:.3f}", flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=int, default=3)
arguments = parser.parse_args()

torch.set_num_threads(1)
train_x, train_y, test_x, test_y = mnist.load()
module = Digits()
state, hook = ddp_comm_hook(arguments.compression, module, lambda: trainer.optimizers[0])
compression = Compression(state, hook)
trainer = L.Trainer(
    accelerator="auto",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    strategy=DDPStrategy(ddp_comm_state=state, ddp_comm_hook=hook),
    callbacks=[compression],
    max_epochs=arguments.epochs,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)
trainer.fit(module, DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True, drop_last=True))
if trainer.is_global_zero:
    ratio = f", {compression.dense / compression.sent:.1f} times fewer" if compression.sent else " (one rank: nothing is compressed)"
    print(f"sent {compression.sent:,} bytes; dense gradients are {compression.dense:,}{ratio}")
