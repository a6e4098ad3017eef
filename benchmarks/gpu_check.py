"""Checks the package on one GPU of CUDA or ROCm, in a few minutes.

    python benchmarks/gpu_check.py                       all sections; exits with 1 if a check fails
    python benchmarks/gpu_check.py bits kernels          these sections
    python benchmarks/gpu_check.py --dry                 all sections on the CPU, small: shows that the script works, and nothing of a GPU
    python benchmarks/gpu_check.py --json gpu.json       writes what was found to a file, too
    python benchmarks/gpu_check.py --list                what there is

It needs `pip install -e '.[torch,testing]'` and a torch that sees the GPU. Paste what it prints, or attach the file of --json, to an issue:
docs/gpu.md says which devices were tried.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout
from benchmarks.common import record  # noqa: E402
from benchmarks.gpu.machine import Machine, refusal  # noqa: E402
from benchmarks.gpu.section import Check, Found, Section, short  # noqa: E402

#: By name: the module in benchmarks/gpu that has it, and its name there. They import torch, which may not be installed.
PLACES = {
    "bits": ("bits", "SECTION"),
    "kernels": ("kernels", "SECTION"),
    "waits": ("costs", "WAITS"),
    "step": ("costs", "STEP"),
    "speed": ("speed", "SECTION"),
    "ddp": ("training", "DDP"),
    "fsdp": ("training", "FSDP"),
}


def section(name: str) -> Section:
    module, attribute = PLACES[name]
    found: Section = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), attribute)
    return found


def ran(one: Section, machine: Machine, bars: Bars) -> tuple[Found, float]:
    """Runs a section and shows its progress. An error ends the section, as a check that failed, and not the run."""
    bar, begun = bars.add_task(one.name, total=1.0), time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what single specs warn of
            found = one.run(machine, lambda share: bars.update(bar, completed=share))
    except Exception as error:
        found = Found([], [], [Check(f"the section ended with {short(error)}", 1, False)])
    bars.remove_task(bar)
    if machine.dry:
        found.notes.insert(0, f"a dry run, on {one.dry}")
    return found, time.monotonic() - begun


def show(console: Console, one: Section, found: Found, seconds: float) -> None:
    verdict = "[green]holds[/]" if found.reproduced else "[red]FAILS[/]"
    if not found.checks:
        verdict = "[yellow]not run[/]"
    console.print(f"\n[bold]{one.name}[/] {one.title}: {verdict}, {seconds:.0f} s")
    for note in found.notes:
        console.print(f"  ({note})", highlight=False, markup=False)
    if found.rows:
        table = Table(*found.columns)
        for row in found.rows:
            table.add_row(*(f"{cell:,}" if isinstance(cell, (int, float)) else str(cell) for cell in row))
        console.print(table, highlight=False, markup=False)
    for check in found.checks:
        console.print(f"  {'ok ' if check.holds else 'NOT'} {check.text}: {check.measured:.4g}", highlight=False, markup=False)


def written(found: Found, seconds: float) -> dict[str, Any]:
    checks = [check._asdict() for check in found.checks]
    return {
        "holds": found.reproduced,
        "seconds": seconds,
        "notes": found.notes,
        "checks": checks,
        "columns": found.columns,
        "rows": found.rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SECTION", choices=[*PLACES, []], help="sections, by default all")
    parser.add_argument("--dry", action="store_true", help="run on the CPU, small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this file")
    parser.add_argument("--list", action="store_true", help="list the sections")
    options = parser.parse_args(arguments)
    console = Console(width=140, soft_wrap=True)
    if (sentence := refusal(options.dry or options.list)) is not None:
        print(sentence, file=sys.stderr)
        return 2
    if options.list:
        for one in map(section, PLACES):
            console.print(f"[bold]{one.name:<8}[/] {one.title} (dry: {one.dry})", highlight=False)
        return 0
    logging.getLogger("grace_ext").setLevel(logging.ERROR)
    machine = Machine(options.dry)
    document = {**record.stamp(), **machine.described(), "dry": machine.dry, "sections": {}}
    for key, value in document.items():
        text = ", ".join(f"{name} {version}" for name, version in value.items()) if isinstance(value, dict) else str(value)
        console.print(f"{key}: {text}" if text else "", highlight=False, markup=False)
    with Bars(console=console, disable=not console.is_terminal) as bars:
        for one in map(section, options.names or PLACES):
            found, seconds = ran(one, machine, bars)
            show(console, one, found, seconds)
            document["sections"][one.name] = written(found, seconds)
            if options.json:  # after each section, so that a run that is ended leaves what it has found
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = [name for name, one in document["sections"].items() if not one["holds"]]
    console.print(f"\n{', '.join(failed)}: FAILED" if failed else "\nall checks hold", highlight=False)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
