"""Compares the predictions of `grace-ext plan --measure` on netlab hosts with exchanges that are measured there.

    python benchmarks/plan/plan.py [--model resnet50] [--rate 100mbit --rate 1gbit] [--hosts 2] [--launcher horovodrun]  needs root (netlab)

Each rate is one job. It makes the plan for five specs, as the command does, with real exchanges of dense and of the three specs that seem
fastest. Then it exchanges with each of the five through the optimizer's wrapper, once in this order and once in reverse, to show drift.
Each predicted exchange must be within 30% of the measured one (median of its steps), and the recommended spec within 10% of the best; so
must the spec that compression=grace("auto") picks in the same job. With --rate unlimited, both must take dense if dense is fastest.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record, shapes
from benchmarks.exchange.jobs import Hosts, launched, slowest

HERE = Path(__file__).parent
OUT = HERE.parent / "results" / "plan.json"
SPECS = ("none", "topk(ratio=0.01) + residual", "efsignsgd + residual", "qsgd(bits=4)", "powersgd(rank=4) + residual")
WITHIN, BEST = 0.30, 0.10
console = Console(width=150, highlight=False)


def measured(hosts: Hosts, launcher: str, job: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Runs the job. Returns each rank's measurements (rank.py)."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "job.json").write_text(json.dumps({**job, "out": name}))
        commands = hosts.commands([str(HERE / "rank.py"), str(Path(name) / "job.json")], by_torchrun=launcher == "torchrun")
        outcome, said = launched(commands, Path(name), timeout)
        if outcome != "completes":
            sys.exit(f"the job {outcome}: {said[-3000:]}")
        return [json.loads((Path(name) / f"rank{rank}.json").read_text()) for rank in range(hosts.count)]


def compared(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns predicted and measured times by spec, and how far the recommended spec is behind the best."""
    plan, rows = ranks[0]["plan"], []
    for row in plan["rows"]:
        turns = zip(*[rank["times"][row["spec"]] for rank in ranks], strict=True)
        by_turn = [statistics.median(slowest(list(turn))) for turn in turns]
        ms = statistics.mean(by_turn)
        rows.append(
            {**row, "measured_ms": ms, "turns_ms": by_turn, "error": row["predicted_ms"] / ms - 1, "alone": row["uncalibrated_ms"] / ms - 1}
        )
    (picked,) = {rank["auto"]["spec"] for rank in ranks}  # all ranks must pick the same spec
    told = {key: plan[key] for key in ("recommended", "reason", "collectives")}
    told["auto"] = {
        "spec": picked,
        "behind_the_best": behind(rows, picked),
        "ms": statistics.median(slowest([r["auto"]["times"] for r in ranks])),
    }
    return {**told, "behind_the_best": behind(rows, plan["recommended"]), "rows": rows}


def behind(rows: list[dict[str, Any]], spec: str) -> float:
    """Returns by which fraction this spec's measured exchange is longer than the best one."""
    return next(row["measured_ms"] for row in rows if row["spec"] == spec) / min(row["measured_ms"] for row in rows) - 1


def show(cell: dict[str, Any]) -> None:
    for row in cell["rows"]:
        fine = "ok" if abs(row["error"]) <= WITHIN else "MISSED"
        told = f"{100 * row['error']:+4.0f}% ({100 * row['alone']:+4.0f}% by the probe alone)"
        turns = ", ".join(f"{ms:.1f}" for ms in row["turns_ms"])
        console.print(
            f"  {row['spec']:42} predicted {row['predicted_ms']:8.1f} ms, measured {row['measured_ms']:8.1f} ({turns}) {told} {fine}"
        )
    for who, spec, lost in (
        ("plan", cell["recommended"], cell["behind_the_best"]),
        ("auto", cell["auto"]["spec"], cell["auto"]["behind_the_best"]),
    ):
        console.print(f"  {who} takes {spec}: {100 * lost:.0f}% behind the best of the five  {'ok' if lost <= BEST else 'MISSED'}")


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(shapes.MODELS)}")] = "resnet50",
    rate: Annotated[list[str] | None, typer.Option(help="rate of the links; default: 100mbit and 1gbit")] = None,
    hosts: Annotated[int, typer.Option(help="number of hosts")] = 2,
    launcher: Annotated[str, typer.Option(help="horovodrun or torchrun")] = "horovodrun",
    budget: Annotated[float, typer.Option(help="seconds of timed steps per spec and turn")] = 4,
    exchanges: Annotated[int, typer.Option(help="number of candidates, besides dense, that the plan exchanges for real")] = 3,
    timeout: Annotated[float, typer.Option(help="seconds that the job of one rate may take")] = 900,
    out: Annotated[Path, typer.Option(help="file for the results, by model, hosts and launcher")] = OUT,
) -> None:
    made, cells = shapes.MODELS[model](), {}
    job = {"shapes": made, "scales": shapes.scales(made), "specs": SPECS, "budget": budget, "exchanges": exchanges}
    for link in rate or ["100mbit", "1gbit"]:
        console.print(f"[bold]{model}, {hosts} hosts, {link}, {launcher}[/bold]")
        with Hosts(hosts, link) as lab:
            cells[link] = compared(measured(lab, launcher, job, timeout))
        show(cells[link])
    known = json.loads(out.read_text()) if out.exists() else {}
    known[f"{model}/{hosts}/{launcher}"] = {**record.stamp(), "exchanges": exchanges, "within": WITHIN, "cells": cells}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
