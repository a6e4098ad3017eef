"""Times a full gradient exchange of real models' shapes over links of a chosen rate: Horovod, DDP and its hooks, GRACE, and grace_ext.

    python benchmarks/exchange/exchange.py --quick  ResNet-50, 1 Gbit/s, 2 hosts, a few systems, under 3 minutes
    python benchmarks/exchange/exchange.py [--model M ...] [--rate R ...] [--hosts N ...] [--grace PATH]  whole cells; needs root (netlab)
    python benchmarks/exchange/exchange.py --local --model tiny                         on this machine, without netlab

A cell is a model, a rate and a number of hosts. Each system runs as its own job, one thread per rank, on the same gradients. Dense
Horovod runs first and last, so that its two times show drift. If a system fails or hangs, that is its result. Each result is saved to --out
at once: an interrupted run continues where it stopped if the code is the same; a complete cell is measured again only with --again.
Results of --quick, --only and --local are printed, and saved only if --out is given.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import plots, record, shapes
from benchmarks.exchange.jobs import Hosts, run
from benchmarks.exchange.systems import DENSE, LINKS, System, listed

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "exchange.json"
RATES = {"100mbit": 1e8, "1gbit": 1e9, "10gbit": 1e10}
console = Console(width=150, highlight=False)


def dense_ms(cell: dict[str, Any]) -> float | None:
    """Returns the mean time of dense Horovod in this cell, the reference of all other times; None if it has no run."""
    runs = cell["dense_ms"]
    return statistics.mean(runs) if runs else None


def seconds_allowed(model: shapes.Shapes, rate: str, hosts: int, budget: float) -> float:
    """Returns the timeout of one job: the start of the ranks and a dozen dense steps, for this link and another package's slow code."""
    count = shapes.elements(model)
    line = 2 * (hosts - 1) / hosts * 32 * count / RATES.get(rate, 1e9)
    return 90 + 8 * (line + count / 3e6 * hosts / 2) + 4 * budget


class Cell:
    """Measures one model at one rate on some hosts. found: earlier results of this cell. links: whether to time plain collectives."""

    def __init__(self, model: str, rate: str, hosts: int, found: dict[str, Any] | None, links: bool):
        self.model, self.shapes, self.hosts, self.links = model, shapes.MODELS[model](), hosts, links
        fresh = {"model": model, "rate": rate, "hosts": hosts, "elements": shapes.elements(self.shapes), "tensors": len(self.shapes)}
        self.data = found or {**fresh, **record.stamp(), "complete": False, "dense_ms": [], "links": [], "systems": {}}
        self.threshold = shapes.threshold_for(self.shapes)

    def measure(self, hosts: Hosts, systems: list[System], budget: float, timeout: float | None, progress: Progress, save: Any) -> None:
        """Runs the systems that have no result yet, and saves after each."""
        job = {"shapes": self.shapes, "scales": shapes.scales(self.shapes), "budget": budget}
        allowed = timeout or seconds_allowed(self.shapes, hosts.rate, self.hosts, budget)
        waiting = [s for s in systems if s is not DENSE and s.name not in self.data["systems"]]
        first = [DENSE, LINKS] if self.links else [DENSE]
        task = progress.add_task("", total=len(first) + len(waiting) + 1)
        for system in [*first, *waiting, DENSE]:
            progress.update(task, description=f"{self.model} {hosts.rate} {self.hosts} hosts: {system.name}")
            seen = run(hosts, system, job, allowed)
            if system is LINKS:
                self._keep_links(seen)
            else:
                self._keep(system, seen)
            save(self.data)
            progress.advance(task)
        self.data["complete"] = True
        save(self.data)
        progress.remove_task(task)

    def _keep_links(self, seen: dict[str, Any]) -> None:
        self.data["links"] = seen.get("collectives", [])
        if not self.data["links"]:
            console.print(f"{LINKS.name:38} {seen['outcome']} {seen['reason']}")

    def _keep(self, system: System, seen: dict[str, Any]) -> None:
        if system is DENSE and seen["outcome"] == "completes":
            self.data["dense_ms"].append(seen["ms"])
            seen["ms"] = dense_ms(self.data)
        spec = system.job["params"] if system.group == "grace" else system.job["argument"]
        self.data["systems"][system.name] = {"group": system.group, "spec": spec, **seen}
        console.print(row(system.name, self.data["systems"][system.name], self.data))


def row(name: str, seen: dict[str, Any], cell: dict[str, Any]) -> str:
    start = f"{name:38} {seen['outcome'] if seen['outcome'] != 'completes' else '':6}"
    if seen["outcome"] != "completes":
        return f"{start} {seen['reason']}"
    dense = dense_ms(cell)
    ratio = f"{seen['ms'] / dense:7.3f}" if dense else "      -"
    sent = seen["sent_bytes"] or seen["wire_bytes"]
    mega = f"{sent / 1e6:8.2f} MB" if sent else "       -   "
    memory = f"{seen['extra_memory'] / (4 * cell['elements']):5.2f}" if seen["extra_memory"] is not None else "    -"
    wrong = "" if seen["ranks_agree"] else "  RANKS DIFFER"
    wrong += "" if seen["finite"] else "  NOT FINITE"
    return f"{start} {seen['ms']:9.1f} ms {ratio} of dense {mega} per rank {memory}x memory  {seen['steps']:2} steps{wrong}"


def load(out: Path | None) -> dict[str, Any]:
    return json.loads(out.read_text()) if out and out.exists() else {"cells": {}}


def store(out: Path | None, results: dict[str, Any]) -> None:
    """Writes the results atomically."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_suffix(".new")
        fresh.write_text(json.dumps(results, indent=1) + "\n")
        fresh.replace(out)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(shapes.MODELS)}; default: all but tiny")] = None,
    rate: Annotated[list[str] | None, typer.Option(help="rate of the links; default: 100mbit, 1gbit and 10gbit")] = None,
    hosts: Annotated[list[int] | None, typer.Option(help="number of hosts; default: 2 and 4")] = None,
    grace: Annotated[Path | None, typer.Option(help="folder of a checkout of sands-lab/grace, to measure it, too")] = None,
    framework: Annotated[str, typer.Option(help="torch, tensorflow (some specs, with torch's beside them), or both")] = "torch",
    only: Annotated[list[str] | None, typer.Option(help="only systems whose names contain this text")] = None,
    budget: Annotated[float, typer.Option(help="seconds of timed steps per system")] = 15,
    timeout: Annotated[float | None, typer.Option(help="seconds per job; default: computed from the size and the rate")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="ResNet-50 at 1gbit, 2 hosts, few systems")] = False,
    local: Annotated[bool, typer.Option("--local", help="all ranks on this machine, without netlab and a limit of the rate")] = False,
    again: Annotated[bool, typer.Option("--again", help="measure complete cells again")] = False,
    out: Annotated[Path | None, typer.Option(help="file of results; default for whole cells: benchmarks/results/exchange.json")] = None,
) -> None:
    if framework not in ("torch", "tensorflow", "both"):
        raise typer.BadParameter(f"framework must be torch, tensorflow or both, got {framework!r}")
    whole = not (quick or only)
    out = out or (RESULTS if whole and not local else None)
    budget = min(budget, 4) if quick else budget
    models = model or (["resnet50"] if quick else [name for name in shapes.MODELS if name != "tiny"])
    rates = ["local"] if local else rate or (["1gbit"] if quick else list(RATES))
    results = load(out)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
        disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        for count, name, link in ((n, m, r) for n in hosts or ([2] if quick or local else [2, 4]) for m in models for r in rates):
            key = f"{name}/{link}/{count}" + ("" if framework == "torch" else f"/{framework}")
            found = results["cells"].get(key)
            if found and found["complete"] and not again:
                console.print(f"{key}: measured already on {found['date']}; --again measures it again")
                continue
            if found and (found["complete"] or found["commit"] != record.commit()):
                found = None
            cell = Cell(name, link, count, found, links=out is not None and not quick)
            options = {"grace_path": str(grace.resolve()) if grace else None, "framework": framework, "quick": quick, "only": only or []}
            systems = listed(cell.threshold, **options)
            console.print(f"[bold]{key}[/bold]: {len(systems)} systems, {cell.data['elements']:,} elements")

            def save(data: dict[str, Any], key: str = key) -> None:
                store(out, {"cells": {**load(out)["cells"], key: data}})

            with Hosts(count, link) as machines:
                cell.measure(machines, systems, budget, timeout, progress, save)
    if out:
        plots.draw_exchange(load(out), ROOT / "docs" / "pictures" if out == RESULTS else out.parent)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds the stack, so that the hosts are taken down
    typer.run(main)
