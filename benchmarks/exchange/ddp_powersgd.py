"""Compares PowerSGD in DDP on Gloo by torch's powerSGD_hook and by grace_ext's ddp_comm_hook, with one bucket and with several.

    python benchmarks/exchange/ddp_powersgd.py [--steps 30] [--timeout 120] [--json OUT.json]

Each row is its own job on 2 ranks, because a mismatched collective in Gloo ends the process. torch's hook starts its second and third
round in callbacks, which run in the order in which collectives happen to finish; with several buckets, ranks may then pair different
collectives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from grace_ext.frameworks.torch import ddp_comm_hook

RANK, WIDTH, LAYERS = 4, 768, 16
#: DDP's bucket_cap_mb: one bucket, DDP's default of 25 MB (3 buckets here), and one bucket per layer.
BUCKETS = {"one": 1000.0, "default": None, "many": 2.0}
FAILURE = re.compile(r"^.*(?:Error|enforce fail|preamble|SIGABRT|exitcode).*$", re.MULTILINE)


def train(system: str, buckets: str, steps: int) -> dict[str, Any]:
    """Trains on this rank. Returns its measurements, and whether the ranks' weights are equal at the end."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    ddp = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=BUCKETS[buckets])
    seen: set[int] = set()
    if system == "torch":
        state: Any = PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2)
        hook: Any = powerSGD_hook
    else:
        state, hook = ddp_comm_hook(f"powersgd(rank={RANK}) + residual @ allreduce", ddp)

    def watched(state, bucket):
        seen.add(bucket.index())
        return hook(state, bucket)

    ddp.register_comm_hook(state, watched)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
    rank, times = dist.get_rank(), []
    for step in range(steps):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = (ddp(x) - x.roll(1, dims=1)).square().mean()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    mine = torch.cat([p.detach().reshape(-1) for p in ddp.parameters()])
    both = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(both, mine)
    same = all(torch.equal(other, mine) for other in both)
    return {"buckets": len(seen), "ms": 1000 * sorted(times[3:])[len(times[3:]) // 2], "loss": loss.item(), "ranks_agree": same}


def run(system: str, buckets: str, steps: int, timeout: float) -> dict[str, Any]:
    """Runs one row as a job. Returns its measurements, or how it failed."""
    row: dict[str, Any] = {"system": system, "bucket_cap": buckets}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--worker", system, buckets, str(out), "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            process.communicate()
            return {**row, "outcome": "hangs", "reason": f"not finished after {timeout:g} s"}
        if process.returncode == 0 and out.exists():
            return {**row, "outcome": "completes", **json.loads(out.read_text())}
    reasons = [" ".join(line.split()) for line in FAILURE.findall(said)]
    reason = next((line for line in reasons if "preamble" in line or "enforce" in line), (reasons or ["no message"])[-1])
    reason = re.sub(r"\S*/(?=\w+\.\w+:\d+)", "", reason)  # source files without their folders
    return {**row, "outcome": "fails", "reason": reason[:200]}


def show(row: dict[str, Any]) -> str:
    name = {"torch": "torch powerSGD_hook", "grace_ext": "grace_ext ddp_comm_hook"}[row["system"]]
    start = f"{name:24} {row['bucket_cap']:8} {row['outcome']:10}"
    if row["outcome"] != "completes":
        return f"{start} {row['reason']}"
    return f"{start} {row['buckets']:7} {row['ms']:8.1f} {row['loss']:10.6f}  {row['ranks_agree']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=120, help="seconds that a job may take")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--buckets", nargs="+", choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        system, buckets, out = arguments.worker
        dist.init_process_group("gloo")
        row = train(system, buckets, arguments.steps)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(row))
        dist.destroy_process_group()
        return
    print(f"{'system':24} {'cap':8} {'outcome':10} {'buckets':>7} {'ms/step':>8} {'loss':>10}  ranks agree")
    rows = []
    for buckets in arguments.buckets:
        for system in ("torch", "grace_ext"):
            rows.append(run(system, buckets, arguments.steps, arguments.timeout))
            print(show(rows[-1]), flush=True)
    if arguments.json:
        versions = {"torch": torch.__version__, "rank": RANK, "steps": arguments.steps}
        arguments.json.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
