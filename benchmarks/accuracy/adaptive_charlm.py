"""Compares uniform compression with L-GreCo's choices on a small character Transformer: bits per character, and bytes.

    python benchmarks/accuracy/adaptive_charlm.py [SPEC ...] [--seeds 0 1 2 3] [--rates 1e-3 2e-3] [--steps 600]
                                         [--out benchmarks/results/adaptive_charlm.json]

The task is that of benchmarks/time_to_accuracy/tasks.py with two layers of width 128. Two ranks are simulated in one process
(LocalCluster), which gives the results of real ranks; as many trainings run at a time as there are cores. Each spec gets the learning rate
that is best in the mean over the seeds, because gradients that are sent late and in large pieces need another rate than those that are sent
at once. The default SPECs include uniform choices of about the bytes of L-GreCo's default, a base whose accuracy hardly depends on bytes,
and no compression. Prints each row when it is known, and writes all as JSON. Exits with 1 if for one of the bases among the SPECs no
lgreco over it sends fewer bytes with at most 0.01 more bits per character."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common.record import cores, stamp
from benchmarks.time_to_accuracy.tasks import CharTransformer

RANKS, BATCH = 2, 4
WORSE = 0.01
SPECS = (
    "none",
    "topk(ratio=0.01) + residual",
    "lgreco(every=25, error=adam, base=topk(ratio=0.01) + residual)",
    "lgreco(every=25, base=topk(ratio=0.01) + residual)",
    "topk(ratio=0.0037) + residual",
    "powersgd(rank=4) + residual",
    "lgreco(every=25, error=adam, alpha=0.9, base=powersgd(rank=4) + residual)",
    "lgreco(every=25, base=powersgd(rank=4) + residual)",
    "powersgd(rank=3) + residual",
    "powersgd(rank=16) + residual",
    "lgreco(every=25, error=adam, alpha=0.9, base=powersgd(rank=16) + residual)",
)


class Small(CharTransformer):
    d, layers = 128, 2


def train(spec: str, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Trains once. Returns bits per character of held-out text at the end, and bytes per rank and step."""
    torch.set_num_threads(1)
    task = Small()
    torch.manual_seed(seed)
    model = task.make_model()
    optimizer = task.make_optimizer(model, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
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
    return task.score(model, 0, 1), statistics.mean(sent)


def tuned(pool: Executor, spec: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the means over the seeds at the learning rate with the fewest bits, and the bits of all trainings."""
    runs = {rate: [pool.submit(train, spec, rate, seed, options.steps) for seed in options.seeds] for rate in options.rates}
    found = {rate: [run.result() for run in of_rate] for rate, of_rate in runs.items()}
    means = {rate: [statistics.mean(column) for column in zip(*of_rate, strict=True)] for rate, of_rate in found.items()}
    best = min(means, key=lambda rate: means[rate][0])
    by_rate = {str(rate): [bits for bits, _ in of_rate] for rate, of_rate in found.items()}
    return {"bits": means[best][0], "bytes": means[best][1], "rate": best, "bits_by_rate_and_seed": by_rate}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC", default=SPECS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    about = {**stamp(), "seeds": options.seeds, "steps": options.steps, "parameters": Small().recipe()["parameters"]}
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(cores()) as pool:
        for spec in options.specs:
            row = results[spec] = tuned(pool, spec, options)
            print(f"{spec:<80} {row['bits']:.3f} bits/character at {row['rate']:g} {row['bytes']:12,.0f} bytes/step", flush=True)
            if options.out:
                options.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return int(not all(any(pays(base, each) for each in policies) for base, policies in with_policies(results)))


def pays(base: dict[str, Any], policy: dict[str, Any]) -> bool:
    return policy["bytes"] < base["bytes"] and policy["bits"] <= base["bits"] + WORSE


def with_policies(results: dict[str, dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Returns (row of a base, rows of the policies over it) for each spec that is the base of another."""
    plain = {str(grace_ext.grace(spec)): row for spec, row in results.items()}
    bases = {spec: str(getattr(grace_ext.grace(spec).policy, "base", "")) for spec in results}
    return [(plain[base], [results[spec] for spec in bases if bases[spec] == base]) for base in {*bases.values()} & {*plain}]


if __name__ == "__main__":
    sys.exit(main())
