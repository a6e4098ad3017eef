"""Measures where the time of a training batch goes, with and without compression, on 2 and 4 ranks behind links of two rates."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.exchange.jobs import Hosts, launched, why
from benchmarks.netlab.netlab import why_not
from grace_ext.papers.experiment import Check, Experiment, Outcome, Progress

SPECS = ("none", "powersgd(rank=2) + residual", "topk(ratio=0.01) + residual", "efsignsgd + residual")
PARTS = ("forward", "backward", "encode", "exchange", "decode", "update")
RATES, SIZES, STEPS, TIMEOUT = ("100mbit", "1gbit"), (2, 4), 20, 300.0
PROGRAM = Path(__file__).with_name("batch_times_rank.py")
APART = 0.1


def measured(size: int, rate: str, specs: tuple[str, ...], steps: int) -> dict[str, dict[str, float]]:
    """Returns by spec the means over the ranks of the seconds of a batch and its parts, and of the bytes sent. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as name, Hosts(size, rate) as hosts:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"specs": specs, "steps": steps, "out": name}))
        outcome, said = launched(hosts.commands([str(PROGRAM), str(folder / "job.json")], by_torchrun=True), folder, TIMEOUT)
        if outcome != "completes":
            raise RuntimeError(f"{size} ranks at {rate}: the job {outcome}: {why(said)}")
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    return {spec: {what: statistics.mean(rank[spec][what] for rank in ranks) for what in ranks[0][spec]} for spec in specs}


def run(quick: bool, progress: Progress) -> Outcome:
    without_links = why_not()
    specs, steps = (SPECS[:2], 5) if quick else (SPECS, STEPS)
    rates, sizes = ("local",) if without_links else RATES[:1] if quick else RATES, SIZES[:1] if quick else SIZES
    rows, checks, off, jobs = [], [], [], [(size, rate) for rate in rates for size in sizes]
    for number, (size, rate) in enumerate(jobs, 1):
        load = os.getloadavg()[0]
        found = measured(size, rate, specs, steps)
        for spec, of in found.items():
            together, faster = sum(of[part] for part in PARTS), found["none"]["batch"] / of["batch"]
            off.append(together / of["batch"] - 1)
            milliseconds = [1000 * seconds for seconds in (*(of[part] for part in PARTS), together, of["batch"])]
            rows.append([rate, size, spec, *milliseconds, faster, of["bytes"] / 1e6, load])
            if spec.startswith("powersgd") and not without_links:
                checks.append(Check(f"{size} ranks, {rate}: a dense batch takes longer than one with {spec}, times", faster, faster > 1))
        progress(number / len(jobs))
    worst = max(off, key=abs)
    checks.insert(0, Check(f"the parts add up to the whole batch within {APART:.0%} (largest difference)", worst, abs(worst) < APART))
    head = ["link", "ranks", "spec", *(f"{part}, ms" for part in PARTS), "sum, ms", "batch, ms", "times as fast as dense", "MB sent"]
    return Outcome([*head, "load before"], rows, checks)


EXPERIMENT = Experiment(
    "batch_times",
    "Where the time of a batch goes: PowerSGD saves wall-clock time on slow links",
    "Vogels, Karimireddy, Jaggi 2019 (PowerSGD)",
    "PowerSGD is the only evaluated method with consistent wall-clock speed-ups over SGD with an optimized communication backend.",
    "not available: the paper's tables could not be read; its GPUs and network are others",
    "The network of PyTorch's basic MNIST example (1.2 million parameters), batch 8 per rank, torchrun over Gloo, one thread per rank, "
    f"each rank on a host of its own made by benchmarks/netlab, links of {' and '.join(RATES)}; {STEPS} batches after 4 that are not "
    "timed, means over batches and ranks. All ranks share one machine's cores, so that computing takes longer with 4 ranks. The "
    "exchange begins after the backward pass; encode, exchange and decode are those of the metrics (`measure`); exchange contains waiting "
    "for other ranks. load before: the machine's load average of the minute before the job, which other work raises. Without root there "
    "are no links: then one rate, on this machine, and only the first condition.",
    "forward, backward, encode, exchange, decode and update add up to the measured batch within 10%; with PowerSGD a batch takes less time "
    "than with dense gradients, for 2 and 4 ranks and both rates",
    6,
    run,
    in_quick_run=False,
)
