"""Runs one rank of levels.py: exchanges with each spec, counts the bytes that its host sends, and compares the means.  rank.py JOB.json"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from grace_ext.frameworks.torch import engine

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import timing
from benchmarks.exchange.base import DistWorld, HorovodWorld
from benchmarks.exchange.rank import Ours


def exchanged(job: dict[str, Any], spec: str, world: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Returns {'sent': bytes per step of this host, 'ms', 'wire_bytes'}, and the last mean. Gradients are the same for every spec."""
    system = Ours({**job, "argument": spec}, world)
    system.fresh()
    system.make()
    sent, times = [], []
    for step in range(job["steps"] + 2):
        system.fresh()
        world.barrier()
        before = timing.transmitted()
        begin = timing.time.perf_counter()
        system.exchange()
        seconds = world.largest(timing.time.perf_counter() - begin)
        world.barrier()  # by now every rank of this host has sent everything
        if step > 1:
            sent.append(timing.transmitted() - before)
            times.append(seconds)
    mean = torch.cat([p.grad.reshape(-1) for p in system.parameters.values()])
    return {"sent": statistics.median(sent), "ms": 1000 * statistics.median(times), "wire_bytes": system.optimizer.wire_bytes}, mean


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    world = HorovodWorld() if engine.ENGINE == "horovod" else DistWorld()
    seen: dict[str, Any] = {"pairs": []}
    for flat, levels in job["pairs"]:
        (one, a), (other, b) = (exchanged(job, spec, world) for spec in (flat, levels))
        apart = float((a - b).abs().max() / a.abs().max())
        seen["pairs"].append({"flat": {"spec": flat, **one}, "levels": {"spec": levels, **other}, "apart": apart})
    (Path(job["out"]) / f"rank{world.rank}.json").write_text(json.dumps(seen))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main()
