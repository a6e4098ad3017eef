"""Trains with Ray Train and compressed gradients: the hook is registered on the model that `prepare_model` returns.

    python examples/ray_mnist.py        (two workers on this machine; Ray starts them, so there is no torchrun)
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import mnist
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model

from grace_ext.frameworks.torch import compress_ddp


def training(options: dict) -> None:
    """Trains the model on one worker; Ray calls it on all of them."""
    rank, size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    train_x, train_y, test_x, test_y = mnist.load()
    model = prepare_model(mnist.make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options["epochs"])
    state = compress_ddp(options["compression"], model, optimizer)  # + all that compression needs
    sent = 0
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "model.pt"))
            model.module.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            state.load_state_dict(torch.load(Path(folder, f"memory-{rank}.pt")))
            sent = saved["sent"]
    for epoch in range(schedule.last_epoch, options["epochs"]):
        for chosen in mnist.batches(len(train_x), rank, size, epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(train_x[chosen]), train_y[chosen]).backward()
            optimizer.step()
            sent += state.wire_bytes
        schedule.step()
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:  # the model is the same on all ranks; the memory is each rank's own, and Ray puts all files into one folder
                saved = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                torch.save({**saved, "sent": sent}, Path(folder, "model.pt"))
            torch.save(state.state_dict(), Path(folder, f"memory-{rank}.pt"))
            metrics = {"accuracy": mnist.accuracy(model.module, test_x, test_y), "sent": sent}
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))


parser = argparse.ArgumentParser(description="Trains on MNIST digits with Ray Train and compressed gradients")
parser.add_argument("--compression", default="topk(ratio=0.01) + residual")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--folder", default="demo/ray", help="where checkpoints are saved; all hosts share it")
arguments = parser.parse_args()

trainer = TorchTrainer(
    training,
    train_loop_config={"compression": arguments.compression, "epochs": arguments.epochs},
    scaling_config=train.ScalingConfig(num_workers=2),
    run_config=train.RunConfig(storage_path=os.path.abspath(arguments.folder), failure_config=train.FailureConfig(max_failures=3)),
)
found = trainer.fit().metrics
steps = arguments.epochs * (4000 // 2 // 32)
dense = steps * sum(4 * p.numel() for p in mnist.make_model().parameters())
print(f"test accuracy {found['accuracy']:.3f}")
print(f"sent {found['sent']:,} bytes; dense gradients are {dense:,}, {dense / found['sent']:.1f} times fewer")
