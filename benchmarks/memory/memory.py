"""Measures how much memory compression takes per rank, in multiples of the gradients, and whether it grows over 1,000 steps.

    python benchmarks/memory/memory.py                  ResNet-50's gradients (102 MB), 2 ranks by horovodrun, and 1,000 steps of 16 MB
    python benchmarks/memory/memory.py --quick          40 MB, and 100 steps of 8 MB; nothing is written unless --out is given
    python benchmarks/memory/memory.py --torchrun       the same with torch.distributed

Two trainings in one process are compared: a backward pass makes gradients and SGD applies them, first without an exchange, then with one.
Bytes resident beyond the first training are extra. `peak` is the most at any time (VmHWM): old and new state, outputs and buffers together.
`steady` is resident between two steps. The C library is set to return large arrays at once, because by default it keeps up to 0.3 times the
gradients of freed memory, different in every run. Code that the first exchange loads does not count; `code` is its size.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record
from benchmarks.exchange.jobs import Hosts, launched, why

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "memory.json"
SPECS = (
    "dense", "none", "topk(ratio=0.01) + residual", "threshold(threshold=10) + residual", "efsignsgd + residual", "qsgd(bits=4)",
    "powersgd(rank=4) + residual", "topk(ratio=0.01) + dgc",
)  # fmt: skip
#: Upper bounds of the peak in multiples of the gradients: a memory of one array (or two), its next version, and buffers.
BOUNDS = {"residual": 2.3, "dgc": 4.3}
#: Upper bound of the growth from the first to the last quarter of a long run, in multiples of the gradients.
GROWTH = 0.05
LONG = 100
MOST_SECONDS = 1800
console = Console(width=140, highlight=False)


def bound(spec: str) -> float | None:
    return BOUNDS.get(spec.partition("+")[2].strip())


def run(spec: str, model: str, steps: int, by_torchrun: bool) -> dict[str, Any]:
    """Returns a row: the memory of the rank with the highest peak, in multiples of the gradients. Raises RuntimeError if a job fails."""
    with tempfile.TemporaryDirectory() as name, Hosts(2, "local") as hosts:
        out = Path(name) / "out.json"
        commands = hosts.commands([str(HERE / "rank.py"), spec, model, str(steps), str(out)], by_torchrun)
        outcome, said = launched(commands, Path(name), MOST_SECONDS)
        if outcome != "completes" or not out.exists():
            raise RuntimeError(f"{spec}: the job {outcome}: {why(said)}")
        ranks = json.loads(out.read_text())
    worst = max(ranks, key=lambda rank: rank["peak"])
    size = worst["gradients"]
    row: dict[str, Any] = {"spec": spec, "gradients": model, "bytes": size, "steps": steps, "ranks": len(ranks)}
    row |= {"engine": "torchrun" if by_torchrun else "horovodrun", "code_bytes": worst["code"]}
    row["bound"] = bound(spec) if steps < LONG else None
    row |= {key: round(worst[key] / size, 3) for key in ("peak", "maxrss", "steady", "trimmed", "early", "late")}
    row["growth"] = round(row["late"] - row["early"], 3)
    row["within"] = row["growth"] <= GROWTH if steps >= LONG else row["bound"] is None or row["peak"] <= row["bound"]
    return row


def show(row: dict[str, Any]) -> str:
    limit = f"at most {row['bound']}" if row["bound"] else f"at most {GROWTH}" if row["steps"] >= LONG else ""
    return (
        f"{row['spec']:38} {row['bytes'] / 1e6:6.1f} MB {row['steps']:5} steps  peak {row['peak']:5.2f}  steady {row['steady']:5.2f}  "
        f"growth {row['growth']:6.3f}  {limit:12} {'' if row['within'] else 'OVER'}"
    )


def main(
    specs: Annotated[list[str] | None, typer.Argument(help="specs, or 'dense' for the engine's own; default: a selection")] = None,
    model: Annotated[str, typer.Option(help="a set of shapes, or megabytes of gradients")] = "resnet50",
    steps: Annotated[int, typer.Option(help="steps with that model")] = 30,
    small: Annotated[int, typer.Option(help="megabytes of gradients in the long run")] = 16,
    long: Annotated[int, typer.Option(help="steps of the long run; 0 for none")] = 1000,
    torchrun: Annotated[bool, typer.Option("--torchrun", help="use torch.distributed instead of Horovod")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="40 MB, 100 steps of 8 MB, three specs")] = False,
    out: Annotated[Path | None, typer.Option(help="results; default for a complete run: benchmarks/results/memory.json")] = None,
) -> None:
    if quick:
        model, small, long = "40", 8, 100
        specs = specs or ["dense", "topk(ratio=0.01) + residual", "topk(ratio=0.01) + dgc"]
    elif not specs and not torchrun:
        out = out or RESULTS
    kinds = [(spec, model, steps) for spec in specs or SPECS]
    kinds += [(spec, str(small), long) for spec in specs or SPECS if long and spec not in ("dense", "none")]
    rows = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(kinds))
        for kind in kinds:
            progress.update(task, description=f"{kind[0]}, {kind[2]} steps")
            rows.append(run(*kind, torchrun))
            console.print(show(rows[-1]))
            progress.advance(task)
            if out:
                out.write_text(json.dumps({**record.stamp(), "rows": rows}, indent=1) + "\n")
    raise typer.Exit(int(not all(row["within"] for row in rows)))


if __name__ == "__main__":
    typer.run(main)
