"""Reproduces the headline claims of the papers behind grace_ext, on data that are bundled or generated.

    python benchmarks/papers/papers.py                 all experiments that have no result yet; then writes docs/papers.md
    python benchmarks/papers/papers.py NAME ...        these experiments, again
    python benchmarks/papers/papers.py --quick         those that take minutes, smaller; writes nothing
    python benchmarks/papers/papers.py --list          what there is
    python benchmarks/papers/papers.py --page          writes docs/papers.md and its pictures from the results

Exits with 1 if an experiment does not show what its criterion asks for. `make papers` and `make papers QUICK=1` call this.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record  # noqa: E402
from benchmarks.papers import batch_times, dp_compression  # noqa: E402
from benchmarks.papers.page import write_page  # noqa: E402
from grace_ext.papers import listed  # noqa: E402
from grace_ext.papers.experiment import Experiment, Outcome  # noqa: E402

EXPERIMENTS: dict[str, Experiment] = {
    **listed.EXPERIMENTS,
    **{experiment.name: experiment for experiment in (batch_times.EXPERIMENT, dp_compression.EXPERIMENT)},
}
ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "papers", ROOT / "docs" / "papers.md"


def saved(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Returns what is written of a run."""
    return {**record.stamp(), "seconds": seconds, "reproduced": outcome.reproduced, **dataclasses.asdict(outcome)}


def told(console: Console, experiment: Experiment, outcome: Outcome, seconds: float) -> None:
    """Prints what a run has shown."""
    verdict = "[green]reproduced[/]" if outcome.reproduced else "[red]not reproduced[/]"
    console.print(f"[bold]{experiment.name}[/] {experiment.title}: {verdict}, {seconds:.0f} s")
    for check in outcome.checks:
        console.print(f"  {'ok ' if check.holds else 'NOT'} {check.text}: {check.measured:.4g}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*EXPERIMENTS, []], help="experiments, by default those without a result"
    )
    parser.add_argument("--quick", action="store_true", help="run them smaller, and write nothing")
    parser.add_argument("--list", action="store_true", help="list the experiments")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    console, failed = Console(width=140, soft_wrap=True), []
    if options.list:
        for one in EXPERIMENTS.values():
            console.print(f"[bold]{one.name:<18}[/] {one.title} ({one.paper}; {one.minutes:g} min)", highlight=False)
        return 0
    chosen = (lambda one: one.in_quick_run) if options.quick else (lambda one: not (RESULTS / f"{one.name}.json").exists())
    lacking = [name for name, one in EXPERIMENTS.items() if chosen(one)]
    with Bars(console=console, disable=not console.is_terminal) as bars:
        for name in [] if options.page else options.names or lacking:
            bar, begun = bars.add_task(name, total=1.0), time.monotonic()
            outcome = EXPERIMENTS[name].run(options.quick, lambda share, bar=bar: bars.update(bar, completed=share))  # type: ignore[misc]
            seconds = time.monotonic() - begun
            bars.remove_task(bar)
            told(console, EXPERIMENTS[name], outcome, seconds)
            if not options.quick:
                RESULTS.mkdir(parents=True, exist_ok=True)
                (RESULTS / f"{name}.json").write_text(json.dumps(saved(outcome, seconds), indent=1) + "\n")
            failed += [] if outcome.reproduced else [name]
    if not options.quick:
        found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in EXPERIMENTS if (RESULTS / f"{name}.json").exists()}
        write_page(PAGE, EXPERIMENTS, found)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
