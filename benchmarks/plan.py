"""What `grace-ext plan --measure` predicts on netlab hosts, beside exchanges that exchange.py's ranks then measure there.

    python benchmarks/plan.py [--model transformer] [--rate 100mbit --rate 1gbit] [--hosts 2] [--auto]      needs root (netlab)

For each rate: the plan runs by horovodrun on the hosts, as a user would run it, for five specs; then each of the five is measured, in a
job of its own, twice, in turn, so that drift shows. What must hold: each predicted step within 30% of the measured one, and the
recommended spec within 10% of the best. With --auto a job with compression=grace("auto") tells what it picks, too.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import record
import shapes
import typer
from exchange_jobs import Hosts, launched, run
from exchange_systems import System
from rich.console import Console

import grace_ext

OUT = Path(__file__).parent / "results" / "plan.json"
SPECS = ("none", "topk(ratio=0.01) + residual", "efsignsgd + residual", "qsgd(bits=4)", "powersgd(rank=4) + residual")
WITHIN, BEST = 0.30, 0.10
console = Console(width=150, highlight=False)


def planned(hosts: Hosts, model: str, exchanges: int) -> dict[str, Any]:
    """What the plan says on these hosts."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"{model}.json"
        file.write_text(json.dumps(shapes.MODELS[model]()))
        program = ["-m", "grace_ext", "plan", str(file), *SPECS, "--measure", "--exchanges", str(exchanges), "--json"]
        outcome, said = launched(hosts.commands(program, by_torchrun=False), Path(name), 900)
    found = re.search(r'\{"model": .*\}', said)
    if outcome != "completes" or not found:
        sys.exit(f"the plan {outcome}: {said[-2000:]}")
    return json.loads(found[0])


def measured(hosts: Hosts, model: str, budget: float) -> dict[str, list[float]]:
    """Milliseconds of an exchange by spec: each in jobs of its own, once in this order and once in the other."""
    made = shapes.MODELS[model]()
    job, seen = {"shapes": made, "scales": shapes.scales(made), "budget": budget}, {spec: [] for spec in SPECS}
    for spec in (*SPECS, *reversed(SPECS)):
        told = run(hosts, System(spec, "ours", {"argument": spec}), job, 900)
        if told["outcome"] != "completes":
            sys.exit(f"{spec} {told['outcome']}: {told['reason']}")
        seen[spec].append(told["ms"])
        console.print(f"    {spec:32} {told['ms']:9.1f} ms  ({told['steps']} steps)")
    return seen


def compared(plan: dict[str, Any], seen: dict[str, list[float]]) -> dict[str, Any]:
    """Predicted beside measured, by spec, and how far the recommended spec is from the best."""
    actual = {str(grace_ext.grace(spec)): statistics.mean(ms) for spec, ms in seen.items()}
    rows = [
        {
            "spec": row["spec"], "predicted_ms": row["exchange_ms"], "measured_ms": actual[row["spec"]],
            "error": row["exchange_ms"] / actual[row["spec"]] - 1, "before_calibration": row["uncalibrated_ms"] / actual[row["spec"]] - 1,
            "exchanged_by_the_plan": row["measured_ms"] is not None,
        }
        for row in plan["rows"]
    ]  # fmt: skip
    behind = actual[plan["spec"]] / min(actual.values()) - 1
    return {"rows": rows, "recommended": plan["spec"], "behind_the_best": behind, "plan_link": plan["link"], "all_ms": seen}


def show(cell: dict[str, Any]) -> None:
    for row in cell["rows"]:
        fine = "ok" if abs(row["error"]) <= WITHIN else "MISSED"
        told = f"{100 * row['error']:+5.0f}%, without exchanges of the plan's own {100 * row['before_calibration']:+5.0f}%"
        console.print(f"  {row['spec']:44} predicted {row['predicted_ms']:9.1f} ms, measured {row['measured_ms']:9.1f} ms: {told}  {fine}")
    fine = "ok" if cell["behind_the_best"] <= BEST else "MISSED"
    console.print(f"  recommended {cell['recommended']}: {100 * cell['behind_the_best']:.0f}% behind the best of the five  {fine}")


def main(
    model: Annotated[str, typer.Option(help=f"of {', '.join(shapes.MODELS)}")] = "transformer",
    rate: Annotated[list[str] | None, typer.Option(help="of the links; default 100mbit and 1gbit")] = None,
    hosts: Annotated[int, typer.Option(help="how many")] = 2,
    budget: Annotated[float, typer.Option(help="seconds of timed steps for each spec and turn")] = 4,
    exchanges: Annotated[int, typer.Option(help="of candidates beside dense, by the plan itself")] = 1,
    out: Annotated[Path, typer.Option(help="results, by model")] = OUT,
) -> None:
    cells = {}
    for link in rate or ["100mbit", "1gbit"]:
        console.print(f"[bold]{model}, {hosts} hosts, {link}[/bold]")
        with Hosts(hosts, link) as lab:
            plan = planned(lab, model, exchanges)
            cells[link] = compared(plan, measured(lab, model, budget))
        show(cells[link])
    known = json.loads(out.read_text()) if out.exists() else {}
    known[f"{model}/{hosts}"] = {**record.stamp(), "exchanges": exchanges, "within": WITHIN, "cells": cells}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
