"""Trains a small character Transformer with uniform compression and with L-GreCo's choices: bits per character, and bytes.

    python benchmarks/adaptive_charlm.py [SPEC ...] [--seeds 0] [--steps 600] [--out benchmarks/results/adaptive_charlm.json]

The task of tta_tasks.py with two layers of width 128, two ranks simulated in this process (LocalCluster), which gives the results of real
ones. By default also uniform choices of about L-GreCo's bytes, a base whose accuracy more bytes hardly change, and no compression. Prints a
table as it goes and writes it as JSON. Exits with 1 if an lgreco sends more than its base, where both are among the SPECs, or is worse by
more than 0.01 bits in the mean of the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from record import stamp
from tta_tasks import CharTransformer

import grace_ext

RANKS, BATCH, RATE = 2, 4, 1e-3
WORSE = 0.01
SPECS = (
    "none",
    "topk(ratio=0.01) + residual", "lgreco(every=25, base=topk(ratio=0.01) + residual)", "topk(ratio=0.0037) + residual",
    "powersgd(rank=4) + residual", "lgreco(every=25, base=powersgd(rank=4) + residual)", "powersgd(rank=3) + residual",
    "powersgd(rank=16) + residual", "lgreco(every=25, base=powersgd(rank=16) + residual)",
)  # fmt: skip


class Small(CharTransformer):
    d, layers = 128, 2


def train(spec: str, seed: int, steps: int, task: Small) -> dict[str, float]:
    """Bits per character of held-out text at the end, and bytes a rank and step."""
    torch.manual_seed(seed)
    model = task.make_model()
    optimizer = task.make_optimizer(model, RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), RANKS, framework="torch")
    draw, sent = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        gradients = []
        for _ in range(RANKS):
            optimizer.zero_grad()
            task.loss(model, torch.randint(task.examples(), (BATCH,), generator=draw)).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        mean = cluster.step(gradients, lr=optimizer.param_groups[0]["lr"])
        for name, p in model.named_parameters():
            p.grad = mean[name]
        optimizer.step()
        schedule.step()
        sent.append(cluster.wire_bytes[0])
    return {"bits": task.score(model, 0, 1), "bytes": statistics.mean(sent)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC", default=SPECS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, results = Small(), {}
    for spec in options.specs:
        runs = [train(spec, seed, options.steps, task) for seed in options.seeds]
        bits = [run["bits"] for run in runs]
        results[spec] = {"bits_by_seed": bits, "bits": statistics.mean(bits), "bytes": statistics.mean(run["bytes"] for run in runs)}
        print(f"{spec:<60} {results[spec]['bits']:.3f} bits/character   {results[spec]['bytes']:12,.0f} bytes/step", flush=True)
        if options.out:
            about = {**stamp(), "seeds": options.seeds, "steps": options.steps, "parameters": task.recipe()["parameters"]}
            options.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return int(any(b["bytes"] > a["bytes"] or b["bits"] > a["bits"] + WORSE for a, b in with_bases(results)))


def with_bases(results: dict[str, dict[str, float]]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(base, policy) of what is a policy over another one of the specs."""
    plain = {str(grace_ext.grace(spec)): row for spec, row in results.items()}
    bases = {spec: str(getattr(grace_ext.grace(spec).policy, "base", "")) for spec in results}
    return [(plain[base], results[spec]) for spec, base in bases.items() if base in plain]


if __name__ == "__main__":
    sys.exit(main())
