"""Defines `grace-ext papers list` and `grace-ext papers run NAME`: their options and their output."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ParameterError
from .plan import progress

if TYPE_CHECKING:
    from ..papers.experiment import Experiment, Outcome

HELP = "Reproduces claims of papers on small problems, each with a criterion and a verdict."
QUICK = "Make the experiment smaller, to see that it runs: fewer seeds, cases and steps. Only a full run gives a verdict that counts."
JSON = "Print one JSON document and nothing else."
papers = typer.Typer(no_args_is_help=True, help=HELP)


@papers.command("list")
def list_experiments(as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False) -> None:
    """Lists the experiments. A checkout of the repository has more: `python benchmarks/papers/papers.py --list`."""
    from ..papers.listed import EXPERIMENTS

    if as_json:
        typer.echo(json.dumps([described(one) for one in EXPERIMENTS.values()]))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "minutes", "what it shows", "paper"):
        table.add_column(heading, justify="right" if heading == "minutes" else "left")
    for one in EXPERIMENTS.values():
        table.add_row(f"[bold]{one.name}[/]", f"{one.minutes:g}", one.title, one.paper)
    Console().print(table)
    Console().print("minutes: on two free cores.", style="dim", highlight=False)


@papers.command("run")
def run_experiment(
    name: Annotated[str, typer.Argument(help="An experiment's name, as `grace-ext papers list` prints it.")],
    quick: Annotated[bool, typer.Option("--quick", help=QUICK)] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False,
) -> None:
    """Runs one experiment, and prints the claim, what was measured, and the verdict. Exits with 1 if its criterion is not met."""
    from ..papers.listed import EXPERIMENTS

    if name not in EXPERIMENTS:
        raise ParameterError(
            f"no experiment is named {name!r}: the package has {', '.join(EXPERIMENTS)}. A checkout of the repository has more "
            "(python benchmarks/papers/papers.py --list)"
        )
    one = EXPERIMENTS[name]
    with progress() as bar:
        task = bar.add_task(name, total=1.0)
        outcome = one.run(quick, lambda share: bar.update(task, completed=share))
    if as_json:
        typer.echo(json.dumps({**described(one), "quick": quick, "reproduced": outcome.reproduced, **asdict(outcome)}, allow_nan=False))
    else:
        report(one, outcome, quick)
    raise typer.Exit(0 if outcome.reproduced else 1)


def described(one: Experiment) -> dict[str, Any]:
    """Returns the words of an experiment."""
    return {key: getattr(one, key) for key in ("name", "title", "paper", "claim", "figure", "recipe", "criterion", "minutes")}


def report(one: Experiment, outcome: Outcome, quick: bool) -> None:
    """Prints an experiment's description, the table of what was measured, its conditions, and the verdict."""
    console = Console()
    console.width = max(console.width, 120)  # specs are long
    console.print(f"[bold]{one.title}[/] ({one.paper})\n", highlight=False)
    for label, text in (("The paper says", one.claim), ("Its figure", one.figure), ("Done here", one.recipe), ("Criterion", one.criterion)):
        console.print(f"[bold]{label}:[/] ", end="")
        console.print(text, markup=False, highlight=False)
    if quick:
        verdict = "its conditions may be looser" if one.in_quick_run else "too short for the criterion: its verdict says little"
        console.print(f"[bold]Quick:[/] this run was smaller than that, and {verdict}.")
    table = Table(box=None, pad_edge=False)
    for heading in outcome.columns:
        table.add_column(heading)
    for row in outcome.rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print()
    console.print(table)
    console.print()
    for check in outcome.checks:
        console.print(f"{'ok ' if check.holds else 'NOT'} {check.text}: {check.measured:.4g}", markup=False, highlight=False)
    console.print(f"\nVerdict: {'[green]reproduced[/]' if outcome.reproduced else '[red]not reproduced[/]'}")
