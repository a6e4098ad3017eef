"""Trains with Ray Train on two workers, of which one fails after three steps: the training that Ray starts again from its checkpoint equals
an undisturbed one in a LocalCluster, and so do the bytes. Started by plain python."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model

SUPPORT, STEPS = str(Path(__file__).parents[1] / "support"), 6
sys.path.insert(0, SUPPORT)


def batch(rank, step):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))
    return x, torch.sin(2 * x[:, :4])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def training(options):
    """Trains on one worker, and saves one checkpoint per step."""
    sys.path.insert(0, options["support"])
    from trainers import Fed

    from grace_ext.frameworks.torch import compress_ddp

    rank, first, sent = train.get_context().get_world_rank(), 0, []
    ddp = prepare_model(Fed())
    optimizer = sgd(ddp)
    state = compress_ddp(options["spec"], ddp, optimizer)
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            model = torch.load(Path(folder, "model.pt"))
            ddp.module.load_state_dict(model["model"])
            optimizer.load_state_dict(model["optimizer"])
            own = torch.load(Path(folder, f"rank-{rank}.pt"))
            state.load_state_dict(own["memory"])
            first, sent = model["steps"], own["sent"]
    for step in range(first, STEPS):
        if step == 3 and first == 0 and rank == 1:
            raise RuntimeError("this worker fails once")
        optimizer.zero_grad()
        ddp(*batch(rank, step))["loss"].backward()
        optimizer.step()
        sent.append(state.wire_bytes)
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                model = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}
                torch.save(model, Path(folder, "model.pt"))
            torch.save({"memory": state.state_dict(), "sent": sent}, Path(folder, f"rank-{rank}.pt"))
            train.report({"first": first}, checkpoint=train.Checkpoint.from_directory(folder))


def main() -> None:
    from trainers import SPECS, Fed, replayed, weights_of

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        result = TorchTrainer(
            training,
            train_loop_config={"spec": SPECS[0], "support": SUPPORT},
            scaling_config=train.ScalingConfig(num_workers=2),
            run_config=train.RunConfig(storage_path=folder, failure_config=train.FailureConfig(max_failures=1)),
        ).fit()
        assert result.metrics["first"] == 3, result.metrics
        with result.checkpoint.as_directory() as last:
            model = Fed()
            model.load_state_dict(torch.load(Path(last, "model.pt"))["model"])
            got = [torch.load(Path(last, f"rank-{rank}.pt"))["sent"] for rank in range(2)]
    weights, sent = replayed(SPECS[0], [[batch(rank, step) for step in range(STEPS)] for rank in range(2)], sgd)
    assert all((weights_of(model)[name] == weights[name]).all() for name in weights)
    assert got == [list(of_rank) for of_rank in zip(*sent, strict=True)], (got, sent)
    print("RAY ok")


main()
