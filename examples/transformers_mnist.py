"""Trains with Hugging Face's Trainer and compressed gradients: a callback is all that compression needs.

    torchrun --nproc-per-node 2 examples/transformers_mnist.py        (with --resume it resumes from its last checkpoint)
"""

from __future__ import annotations

import argparse

import mnist
import torch
from transformers import Trainer, TrainingArguments

from grace_ext.integrations.transformers import CompressionCallback

parser = argparse.ArgumentParser(description="Trains on MNIST digits with Trainer and compressed gradients")
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=float, default=12)
parser.add_argument("--folder", default="demo/transformers", help="where checkpoints are saved; all hosts share it")
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()


class Digits(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = mnist.make_model()

    def forward(self, images, labels):
        logits = self.network(images)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


torch.set_num_threads(1)
train_x, train_y, test_x, test_y = mnist.load()
compression = CompressionCallback(options.compression)  # +
trainer = Trainer(
    model=Digits(),
    args=TrainingArguments(
        output_dir=options.folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=0.05,
        optim="sgd",
        optim_args="momentum=0.9",
        save_strategy="epoch",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=[{"images": x, "labels": y} for x, y in zip(train_x, train_y, strict=True)],
    callbacks=[compression],  # +
)
trainer.train(resume_from_checkpoint=options.resume)

if trainer.is_world_process_zero():
    network = trainer.model.network.cpu().eval()
    print(f"test accuracy {mnist.accuracy(network, test_x, test_y):.3f}", flush=True)
    sent, dense = compression.state.wire_bytes, sum(4 * p.numel() for p in network.parameters())
    print(f"sent {sent:,} bytes in the last step" + (f", {dense / sent:.1f} times fewer than dense" if sent else " (one process)"))
