"""Times whole training steps of a Transformer under HSDP on netlab hosts: FSDP2's own exchange between the hosts, and `fsdp_hook`.

    python benchmarks/levels/hsdp.py [--rate 100mbit] [--ranks 2] [--steps 20]        (root)

Each of 2 hosts has a whole model, sharded among its ranks; only the exchange between the hosts crosses their links. All systems train in
one job, and their steps alternate. A step is the forward and the backward pass, which end with the exchange, and the optimizer. 'inside
hosts' exchanges nothing between the hosts: it is what computing takes.
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
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record
from benchmarks.exchange.jobs import launched, slowest
from benchmarks.levels.levels import commands
from benchmarks.netlab.netlab import Netlab

HERE = Path(__file__).parent
OUT = HERE.parent / "results" / "hsdp.json"
#: By name: the spec of fsdp_hook, or how FSDP2 itself exchanges.
SYSTEMS = {
    "FSDP2": "float32",
    "FSDP2, reduce_dtype=bfloat16": "bfloat16",
    "topk": "topk(ratio=0.01) + residual",
    "powersgd": "powersgd(rank=4) + residual",
    "inside hosts": "nothing",
}
HOSTS, GOAL = 2, 0.15
MODEL = {"width": 512, "heads": 8, "layers": 4, "vocabulary": 256}
console = Console(width=150, highlight=False)


def measured(job: dict[str, Any], ranks: int, rate: str) -> list[dict[str, Any]]:
    """Runs the job on `HOSTS` hosts. Returns the ranks' reports."""
    with tempfile.TemporaryDirectory() as name, Netlab(HOSTS, rate=rate) as lab:
        (Path(name) / "job.json").write_text(json.dumps({**job, "out": name}))
        program = [str(HERE / "hsdp_rank.py"), f"{name}/job.json"]
        outcome, said = launched(commands(lab, "torchrun", ranks, program), Path(name), 1200)
        if outcome != "completes":
            sys.exit(f"the job {outcome}: {said[-3000:]}")
        return [json.loads((Path(name) / f"rank{rank}.json").read_text()) for rank in range(HOSTS * ranks)]


def summary(by_rank: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Returns one system's row. ms: medians over the steps of the slowest rank; sent_bytes: those of the host that sends most."""
    rows = [rank["systems"][name] for rank in by_rank]
    times = {part: slowest([row[part] for row in rows]) for part in ("step", "forward", "backward", "optimizer")}
    return {
        **{f"{part}_ms": statistics.median(found) for part, found in times.items()},
        "all_ms": [round(ms, 1) for ms in times["step"]],
        "steps": len(times["step"]),
        "sent_bytes": max(statistics.median(row["sent"]) for row in rows),
        "wire_bytes": max(row["wire_bytes"] for row in rows) or None,
        "loss": statistics.mean(row["loss"] for row in rows),
    }


def main(
    rate: Annotated[str, typer.Option(help="rate of the hosts' links")] = "100mbit",
    ranks: Annotated[int, typer.Option(help="ranks per host, which are the shards of a replica")] = 2,
    steps: Annotated[int, typer.Option(help="timed steps per system")] = 20,
    batch: Annotated[int, typer.Option(help="sequences per rank and step")] = 1,
    length: Annotated[int, typer.Option(help="tokens per sequence")] = 32,
    out: Annotated[Path, typer.Option(help="file for the results, by layout and rate")] = OUT,
) -> None:
    job = {"model": MODEL, "systems": SYSTEMS, "hosts": HOSTS, "steps": steps, "warmups": 3, "batch": batch, "length": length}
    by_rank = measured(job, ranks, rate)
    rows = {name: summary(by_rank, name) for name in SYSTEMS}
    elements, own = by_rank[0]["elements"], rows["FSDP2"]["step_ms"]
    table = Table(
        "system", "step, ms", "of FSDP2's", "sent per host", title=f"{elements:,} parameters, {HOSTS} hosts x {ranks} ranks, {rate}"
    )
    for name, row in rows.items():
        row["ratio"] = row["step_ms"] / own
        table.add_row(name, f"{row['step_ms']:,.0f}", f"{row['ratio']:.3f}", f"{row['sent_bytes']:,.0f}")
    console.print(table)
    missed = [name for name in ("topk", "powersgd") if rows[name]["ratio"] > GOAL]
    console.print(f"at most {GOAL} of FSDP2's step: " + (f"MISSED by {', '.join(missed)}" if missed else "held"))
    known = json.loads(out.read_text()) if out.exists() else {}
    known[f"{HOSTS}x{ranks}/{rate}"] = {**record.stamp(), **job, "elements": elements, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
