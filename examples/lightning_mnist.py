"""Trains with Lightning and compressed gradients: a strategy is all that compression needs.

    torchrun --nproc-per-node 2 examples/lightning_mnist.py
"""

from __future__ import annotations

import argparse
import os

import lightning as L
import mnist
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from grace_ext.integrations.lightning import CompressionStrategy


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = mnist.make_model()

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.epochs)]


class Progress(L.Callback):
    """Prints the accuracy, and adds up what was sent."""

    sent, dense = 0, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.sent += trainer.strategy.state.wire_bytes
        self.dense += sum(4 * p.numel() for p in module.parameters())

    def on_train_epoch_end(self, trainer, module):
        if trainer.is_global_zero:
            reached = mnist.accuracy(module.network, test_x.to(module.device), test_y.to(module.device))
            print(f"epoch {trainer.current_epoch + 1}: test accuracy {reached:.3f}", flush=True)


parser = argparse.ArgumentParser(description="Trains on MNIST digits with Lightning and compressed gradients")
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--folder", default="demo/lightning", help="where checkpoints are saved; all hosts share it")
parser.add_argument("--resume", help="the checkpoint to resume from, or 'last'")
arguments = parser.parse_args()

torch.set_num_threads(1)
train_x, train_y, test_x, test_y = mnist.load()
progress = Progress()
trainer = L.Trainer(
    accelerator="auto",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    strategy=CompressionStrategy(arguments.compression),  # + all that compression needs
    callbacks=[progress, ModelCheckpoint(arguments.folder, save_last=True)],
    max_epochs=arguments.epochs,
    logger=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)
data = DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True, drop_last=True)
trainer.fit(Digits(), data, ckpt_path=arguments.resume)
if trainer.is_global_zero:
    ratio = f", {progress.dense / progress.sent:.1f} times fewer" if progress.sent else " (one rank: nothing is compressed)"
    print(f"sent {progress.sent:,} bytes; dense gradients are {progress.dense:,}{ratio}")
