"""Times training to the same accuracy over slow links, by dense Horovod and by compressors with their natural memories.

    python benchmarks/time_to_accuracy/time_to_accuracy.py                     two hosts, 100 Mbit/s, about 25 minutes; needs root (netlab)
    python benchmarks/time_to_accuracy/time_to_accuracy.py --quick  dense and three compressors on the MNIST network, under 4 minutes
    python benchmarks/time_to_accuracy/time_to_accuracy.py --task char-transformer --spec dense --spec "powersgd(rank=4)"
    python benchmarks/time_to_accuracy/time_to_accuracy.py --tune  dense training alone, in this process, for the rates of tasks.py

The clock runs from the first step until the mean score of three evaluations in a row reaches the target, and stops during evaluations.
All trainings use the recipe of dense training, learning rate included. Each training is its own job, and its row is saved to --out when it
ends: an interrupted run continues where it stopped if the code is the same. Writes a picture beside the results.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record
from benchmarks.exchange.jobs import Hosts, ended, environment, why
from benchmarks.time_to_accuracy.picture import draw
from benchmarks.time_to_accuracy.tasks import SMOOTH, TASKS, Task

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "time_to_accuracy.json"
RATE, RANKS, KEPT = "100mbit", 2, 0.01
COMPRESSORS = ("topk(ratio=0.01)", "threshold", "efsignsgd", "powersgd(rank=4)", "qsgd(bits=4)", "fp16")
QUICK = ("dense", "topk(ratio=0.01)", "efsignsgd", "powersgd(rank=4)")
SEEDS = {"mnist-cnn": (0, 1), "char-transformer": (0,)}
START_SECONDS = 90
KEY = ("task", "spec", "seed")  # of a row
console = Console(width=170, highlight=False)


def natural(compressor: str, task: Task) -> str:
    """Returns the spec with its memory. A bare 'threshold' gets 1 / (2 sqrt(k)), with k 1% of all elements, as documented."""
    if compressor == "threshold":
        elements = sum(p.numel() for p in task.make_model().parameters())
        compressor = f"threshold(threshold={1 / (2 * math.sqrt(KEPT * elements)):.2g})"
    if compressor == "dense" or "+" in compressor:
        return compressor
    return f"{compressor} + {grace_ext.grace(f'{compressor} + none').compressor.natural_memory}"


def run(hosts: Hosts, job: dict[str, Any], show: Any) -> dict[str, Any]:
    """Runs a job. Returns the row that its rank 0 wrote at the end. Raises RuntimeError with the reason if the job fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, log = folder / "out.json", folder / "log"
        (folder / "job.json").write_text(json.dumps({**job, "out": str(out)}))
        (command,) = hosts.commands([str(HERE / "rank.py"), str(folder / "job.json")], by_torchrun=False)
        with log.open("w") as said:
            process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, cwd=folder
            )
            try:
                deadline = time.monotonic() + START_SECONDS + 3 * job["limit"]
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.3)
                    if out.exists():
                        show(json.loads(out.read_text()))
            finally:
                ended(process)
        row = json.loads(out.read_text()) if out.exists() else {}
        if process.returncode or not row.pop("over", False):
            hosts.clean()
            raise RuntimeError(f"{job['task']} {job['spec']} failed: {why(log.read_text(errors='replace'))}")
    return row


class Results:
    """Holds the rows of the result file, one per (task, spec, seed), of the same code and recipes."""

    def __init__(self, out: Path | None, tasks: dict[str, Task], again: bool):
        self.out = out
        now = {**record.stamp(), "rate": RATE, "ranks": RANKS, "tasks": {name: task.recipe() for name, task in tasks.items()}}
        found = json.loads(out.read_text()) if out and out.exists() else {}
        same = found.get("commit") == now["commit"] and found.get("rate") == RATE and not again
        stale = [name for name, recipe in now["tasks"].items() if found.get("tasks", {}).get(name) != recipe]
        self.rows = [row for row in found.get("rows", []) if row["task"] not in stale] if same else []
        self.head = {**now, "tasks": {**(found["tasks"] if same else {}), **now["tasks"]}}

    def has(self, job: dict[str, Any]) -> bool:
        """Whether there is a row for this job. A row that did not reach the target counts if its time limit was at least as long."""
        same = [row for row in self.rows if all(row[key] == job[key] for key in KEY)]
        return any(row["reached"] or row["limit"] >= job["limit"] for row in same)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file atomically, one line per row."""
        self.rows = [known for known in self.rows if any(known[key] != row[key] for key in KEY)] + [row]
        if self.out:
            head = json.dumps(self.head, indent=1).removesuffix("\n}")
            rows = ",\n  ".join(json.dumps(row) for row in self.rows)
            fresh = self.out.with_suffix(".new")
            fresh.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
            fresh.replace(self.out)


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    dense = next((r for r in rows if r["spec"] == "dense" and all(r[k] == row[k] for k in ("task", "seed"))), None)
    times = f"{dense['seconds'] / row['seconds']:6.1f}x dense" if dense and dense["reached"] and row["reached"] else " " * 13
    outcome = "" if row["reached"] else "NOT REACHED"
    return (
        f"{row['task']:17} {row['spec']:40} seed {row['seed']}  {row['seconds']:7.1f} s {row['steps']:5} steps {times}  "
        f"{row['step_ms']:7.1f} ms per step (computing {row['compute_ms']:.1f})  {row['bytes_per_step'] / 1e6:6.3f} MB  {outcome}"
    )


def tune(task: Task, lr: float, seed: int, seconds: float) -> dict[str, Any]:
    """Trains densely in this process: the joint batch of all ranks gives the gradient of dense averaging."""
    torch.manual_seed(seed)
    model, began = task.make_model(), time.monotonic()
    optimizer, scores = task.make_optimizer(model, lr), []
    shares = (task.batches(seed, rank, RANKS) for rank in range(RANKS))
    for number, batches in enumerate(zip(*shares, strict=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, number / task.rise)
        optimizer.zero_grad()
        task.loss(model, torch.cat(batches)).backward()
        optimizer.step()
        if number % task.every == 0:
            scores.append(task.score(model, 0, 1))
            mean = sum(scores[-SMOOTH:]) / len(scores[-SMOOTH:])
            reached = len(scores) >= SMOOTH and task.reached(mean)
            if reached or time.monotonic() - began > seconds:
                break
    return {"task": task.name, "lr": lr, "seed": seed, "steps": number, "reached": reached, "score": round(mean, 3)}


def tune_all(tasks: dict[str, Task], seeds: list[int] | None, limit: float, out: Path | None) -> None:
    """Counts the steps to the target for every learning rate."""
    torch.set_num_threads(1)
    rows = []
    for name, task in tasks.items():
        for lr, seed in ((lr, seed) for lr in task.rates for seed in seeds or SEEDS[name]):
            rows.append(tune(task, lr, seed, limit))
            console.print(f"{name:17} rate {lr:<8g} seed {seed} {rows[-1]['steps']:5} steps, {task.unit} {rows[-1]['score']}")
            if out:
                out.write_text(json.dumps({**record.stamp(), "rows": rows}, indent=1) + "\n")


def main(
    tasks: Annotated[list[str] | None, typer.Option("--task", help=f"one of {', '.join(TASKS)}; default: all")] = None,
    specs: Annotated[list[str] | None, typer.Option("--spec", help="spec, or 'dense'; without a memory it gets its natural one")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="default: 0 and 1 for mnist-cnn, 0 for char-transformer")] = None,
    limit: Annotated[float, typer.Option(help="seconds of training after which a job gives up")] = 500,
    quick: Annotated[bool, typer.Option("--quick", help="mnist-cnn, one seed, few compressors")] = False,
    tuning: Annotated[bool, typer.Option("--tune", help="compare learning rates of dense training")] = False,
    again: Annotated[bool, typer.Option("--again", help="discard the rows of --out")] = False,
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/results/time_to_accuracy.json; none with --quick, --tune")] = None,
) -> None:
    chosen = {name: TASKS[name]() for name in tasks or (["mnist-cnn"] if quick else TASKS)}
    if tuning:
        return tune_all(chosen, seeds, limit, out)
    results = Results(out or (None if quick else RESULTS), chosen, again)
    jobs = [
        {"task": name, "spec": natural(spec, task), "seed": seed, "limit": limit}
        for name, task in chosen.items()
        for seed in seeds or ((0,) if quick else SEEDS[name])
        for spec in specs or (QUICK if quick else ("dense", *COMPRESSORS))
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[score]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, Hosts(RANKS, RATE) as hosts:
        done = progress.add_task("all", total=len(jobs), score="")
        for job in jobs:
            if not results.has(job):
                bar = progress.add_task(f"{job['task']} {job['spec']} seed {job['seed']}", total=limit, score="starts")

                def show(row: dict[str, Any], bar: Any = bar) -> None:
                    progress.update(bar, completed=row["seconds"], score=f"step {row['steps']}: {row['score']:.3f}")

                seen = run(hosts, job, show)
                results.add({key: job[key] for key in (*KEY, "limit")} | rounded(seen))
                progress.remove_task(bar)
                console.print(line(results.rows[-1], results.rows))
            progress.advance(done)
    if results.out:
        draw(results.head, results.rows, results.out.with_suffix(".png"))


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the stack, so that the hosts are taken down
    typer.run(main)
