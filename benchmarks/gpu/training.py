"""Trains by DistributedDataParallel and by FSDP2 with our hooks, in real jobs: one rank on NCCL, or in a dry run two ranks on Gloo."""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.exchange.jobs import Hosts, launched, why
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.section import Check, Found, Progress, Section, none_of

JOB = Path(__file__).with_name("rank.py")
SPECS = (
    "none + none", "topk(ratio=0.01) + residual", "efsignsgd + residual", "qsgd(bits=4) + none", "powersgd(rank=4) + residual",
)  # fmt: skip
MODEL = {"width": 1024, "layers": 12, "steps": 10, "bucket_mb": 25.0}
DRY_MODEL = {"width": 32, "layers": 4, "steps": 3, "bucket_mb": 0.01}
#: The largest difference of weights that training the same in two ways may make.
SAME = 1e-5
TIMEOUT = 300.0


def trained(machine: Machine, systems: list[tuple[str, str | None]]) -> list[list[dict[str, Any]]]:
    """Runs the job. Returns the ranks' reports; raises RuntimeError with the job's reason if it fails."""
    ranks, model = (2, DRY_MODEL) if machine.dry else (1, MODEL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({**model, "device": str(machine.device), "systems": systems, "out": name}))
        commands = Hosts(ranks, "local").commands([str(JOB), str(folder / "job.json")], by_torchrun=True)
        outcome, said = launched(commands, folder, TIMEOUT)
        if outcome != "completes":
            raise RuntimeError(f"the job {outcome}: {why(said)}")
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def compared(machine: Machine, how: str) -> Found:
    """Returns what training by this wrapper shows beside DDP without a hook."""
    by_rank = trained(machine, [("ddp", None), *((how, spec) for spec in SPECS)])
    rows: list[list[Any]] = []
    for row in by_rank[0]:
        beside = [f"{row['beside']:.2g}"] if "beside" in row else []
        rows.append([row["spec"] or "DDP without a hook", round(row["ms"], 2), f"{row['loss']:.4f}", f"{row['difference']:.2g}", *beside])
    numbers = range(len(by_rank[0]))
    apart = [n for n in numbers if len({rank[n]["digest"] for rank in by_rank}) > 1]
    endless = [n for n in numbers if not math.isfinite(by_rank[0][n]["loss"] + by_rank[0][n]["difference"])]
    dense = next(row["difference"] for row in by_rank[0] if row["spec"] == "none + none")
    checks = [
        Check(f"weights with 'none' and without a hook differ by at most {SAME:g}", dense, dense <= SAME),
        none_of("systems whose ranks have other weights", len(numbers), apart),
        none_of("systems whose loss or weights are not finite", len(numbers), endless),
    ]
    columns, notes = (
        ["system", "ms a step", "loss", "weights from no hook's"],
        [f"{len(by_rank)} ranks on {'Gloo' if machine.dry else 'NCCL'}"],
    )
    if machine.dry:
        notes.append("not run: steps on another stream, which a CPU does not have")
    else:
        off = [row["spec"] for row in by_rank[0] if not row["beside"] <= SAME]
        checks.append(none_of("systems that train otherwise on another stream", len(numbers), off))
        columns.append("on another stream")
    return Found(columns, rows, checks, notes=notes)


def ddp(machine: Machine, progress: Progress) -> Found:
    return compared(machine, "ddp")


def fsdp(machine: Machine, progress: Progress) -> Found:
    if not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
        return Found([], [], [], notes=[f"not run: torch {torch.__version__} has no torch.distributed.fsdp.fully_shard"])
    return compared(machine, "fsdp")


DDP = Section("ddp", "our hook in DistributedDataParallel beside no hook", "two ranks on Gloo with tensors on the CPU", ddp)
FSDP = Section("fsdp", "fsdp_hook with FSDP2 beside DDP without a hook", "two ranks on Gloo with tensors on the CPU", fsdp)
