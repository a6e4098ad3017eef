"""Runs one rank of the sections `ddp` and `fsdp`: trains one model per system, and compares their weights.  rank.py JOB.json"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from grace_ext.frameworks.torch import compress_ddp, fsdp_hook

#: Clock cycles, tens of milliseconds, for which a stream sleeps before a step.
SLEEP = 50_000_000


class Training:
    """Trains a copy of the model. how: 'ddp' or 'fsdp'; spec: what its hook sends, or None for no hook."""

    def __init__(self, how: str, spec: str | None, job: dict[str, Any], device: torch.device):
        torch.manual_seed(0)
        layers = [layer for _ in range(job["layers"]) for layer in (nn.Linear(job["width"], job["width"]), nn.Tanh())]
        self.job, self.device, size = job, device, dist.get_world_size()
        self.model: nn.Module = nn.Sequential(*layers).to(device)
        if how == "ddp":
            places = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=places, bucket_cap_mb=job["bucket_mb"])
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (size, 1), mesh_dim_names=("replicate", "shard"))
            for layer in layers[::2]:
                fully_shard(layer, mesh=mesh["shard"])
            fully_shard(self.model, mesh=mesh["shard"])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        if spec and how == "ddp":
            compress_ddp(spec, self.model, self.optimizer, simulate=size == 1)
        elif spec:
            self.state = fsdp_hook(spec, self.model, mesh["replicate"], self.optimizer, simulate=size == 1)

    def step(self, number: int, behind: bool) -> float:
        """Makes one step on this rank's own data. Returns the seconds until the device has done it. behind: first makes the stream sleep,
        so that whatever does not wait for it comes too early."""
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        x = torch.randn(32, self.job["width"], generator=generator).to(self.device)
        self._wait()
        start = time.perf_counter()
        if behind:
            torch.cuda._sleep(SLEEP)
        self.optimizer.zero_grad()
        self.loss = (self.model(x) - x.roll(1, dims=1)).square().mean()
        self.loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self, stream: Any = None) -> dict[str, Any]:
        """Trains, on another stream if one is given."""
        times = []
        for number in range(self.job["steps"]):
            with torch.cuda.stream(stream) if stream else nullcontext():
                times.append(self.step(number, stream is not None))
        weights = torch.cat([_whole(parameter).reshape(-1) for parameter in self.model.parameters()]).cpu()
        digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        timed = sorted(times[1:])
        return {"ms": 1000 * timed[len(timed) // 2], "loss": self.loss.item(), "digest": digest, "weights": weights}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    held: Any = parameter.detach()
    return held.to_local() if hasattr(held, "to_local") else held


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    plain = Training("ddp", None, job, device).run()
    rows = []
    for how, spec in job["systems"]:
        found = plain if spec is None else Training(how, spec, job, device).run()
        row = {"how": how, "spec": spec, **found, "difference": (found["weights"] - plain["weights"]).abs().max().item()}
        if device.type == "cuda":
            again = Training(how, spec, job, device).run(torch.cuda.Stream())
            row["beside"] = (again["weights"] - found["weights"]).abs().max().item()
        del row["weights"]
        rows.append(row)
    (Path(job["out"]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
