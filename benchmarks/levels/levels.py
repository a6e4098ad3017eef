"""Compares two-level with flat exchanges on netlab hosts: the bytes that cross the link, and the difference of the results.

    python benchmarks/levels/levels.py [--model transformer] [--rate 100mbit] [--hosts 2] [--ranks 2] [--launcher torchrun]   (root)

A compressed exchange in two levels must send at most half the bytes of the flat one over a host's link (counted at its interface, headers
included). If compression is linear, both must give the same mean, to 1e-6 of the largest element.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record, shapes
from benchmarks.exchange.jobs import horovodrun, launched
from benchmarks.netlab.netlab import Netlab

HERE = Path(__file__).parent
OUT = HERE.parent / "results" / "levels.json"
PAIRS = [
    ("none", "none @ hierarchical"),
    ("randomk(ratio=0.01)", "randomk(ratio=0.01) @ hierarchical"),
    ("topk(ratio=0.01) + residual", "topk(ratio=0.01) + residual @ hierarchical"),
    ("qsgd(bits=4)", "qsgd(bits=4) @ hierarchical"),
]
LINEAR = ("none", "randomk")
console = Console(width=150, highlight=False)


def commands(lab: Netlab, launcher: str, ranks: int, program: list[str]) -> list[list[str]]:
    """Returns the command lines to start together, for `ranks` ranks per host."""
    if launcher == "horovodrun":
        hosts = ["-H", ",".join(f"{host}:{ranks}" for host in lab.addresses), "--network-interfaces", "eth0", "--disable-cache"]
        start = [horovodrun(), "--gloo", "-np", str(ranks * len(lab.addresses)), *hosts]
        return [lab.command([*start, sys.executable, *program])]
    meet = [
        "--nnodes",
        str(len(lab.addresses)),
        "--nproc-per-node",
        str(ranks),
        "--master-addr",
        lab.addresses["h1"],
        "--master-port",
        "29511",
    ]
    start = [sys.executable, "-m", "torch.distributed.run", *meet]
    return [lab.command([*start, "--node-rank", str(rank), *program], host) for rank, host in enumerate(lab.addresses)]


def measured(job: dict[str, Any], hosts: int, ranks: int, rate: str, launcher: str) -> list[dict[str, Any]]:
    """Runs the job. Returns pairs of the flat and the two-level exchange; `sent` is that of the host that sends most."""
    with tempfile.TemporaryDirectory() as name, Netlab(hosts, rate=rate) as lab:
        (Path(name) / "job.json").write_text(json.dumps({**job, "out": name}))
        outcome, said = launched(commands(lab, launcher, ranks, [str(HERE / "rank.py"), f"{name}/job.json"]), Path(name), 600)
        if outcome != "completes":
            sys.exit(f"the job {outcome}: {said[-3000:]}")
        every = [json.loads((Path(name) / f"rank{rank}.json").read_text())["pairs"] for rank in range(hosts * ranks)]
    for number, pair in enumerate(every[0]):
        for which in ("flat", "levels"):
            pair[which]["sent"] = max(rank[number][which]["sent"] for rank in every)
        pair["crossing"] = pair["levels"]["sent"] / pair["flat"]["sent"]
    return every[0]


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(shapes.MODELS)}")] = "transformer",
    rate: Annotated[str, typer.Option(help="rate of the hosts' links")] = "100mbit",
    hosts: Annotated[int, typer.Option(help="number of hosts")] = 2,
    ranks: Annotated[int, typer.Option(help="ranks per host")] = 2,
    launcher: Annotated[str, typer.Option(help="torchrun or horovodrun")] = "torchrun",
    out: Annotated[Path, typer.Option(help="file for the results, by model, layout and launcher")] = OUT,
) -> None:
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
    made = shapes.MODELS[model]()
    job = {"shapes": made, "scales": shapes.scales(made), "pairs": PAIRS, "steps": 5}
    pairs = measured(job, hosts, ranks, rate, launcher)
    console.print(f"[bold]{model}, {hosts} hosts of {ranks} ranks, {rate}, {launcher}[/bold]")
    for pair in pairs:
        flat, levels, linear = pair["flat"], pair["levels"], pair["flat"]["spec"].startswith(LINEAR)
        fine = (pair["apart"] <= 1e-6 if linear else True) and (pair["crossing"] <= 0.5 if flat["spec"] != "none" and not linear else True)
        told = f"{flat['sent'] / 1e6:7.3f} MB flat, {levels['sent'] / 1e6:7.3f} MB in two levels: x{pair['crossing']:.2f}"
        same = f"apart {pair['apart']:.1e}" if linear else ""
        console.print(f"  {flat['spec']:30} {told}; {flat['ms']:7.1f} and {levels['ms']:7.1f} ms  {same} {'ok' if fine else 'MISSED'}")
    known = json.loads(out.read_text()) if out.exists() else {}
    known[f"{model}/{hosts}x{ranks}/{rate}/{launcher}"] = {**record.stamp(), "pairs": pairs}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
