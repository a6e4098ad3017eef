"""The command line: `grace-ext list | show NAME | check`, each with --json (a JSON document on stdout, nothing else there)."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import __version__, check, communicators, compressors, memories
from .errors import GraceError, IncompatiblePartsError, UnknownPartError
from .parts import valid_range

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Gradient compression by name.", pretty_exceptions_enable=False)
KINDS: dict[str, Any] = {"compressor": compressors, "memory": memories, "communicator": communicators}
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"grace-ext {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def describe(kind: str, name: str) -> dict[str, Any]:
    """What is known of a part, from its class: all JSON types."""
    cls = KINDS[kind].get(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    knobs = [
        {"name": f.name, "default": f.default, "range": valid_range(f), "help": f.metadata["help"]} for f in dataclasses.fields(cls)
    ]
    found = {"kind": kind, "name": name, "summary": text.splitlines()[0], "text": text, "knobs": knobs}
    if kind == "compressor":
        part = cls.create()
        properties = ("summable", "unbiased", "wants_memory", "selects", "votes", "rounds")
        found["properties"] = {p: bool(getattr(part, p)) for p in properties}
        found["communicators"] = [c for c in communicators.names() if _fits(part, c)]
    return found


def _fits(compressor: Any, communicator: str) -> bool:
    try:
        communicators.get(communicator).create().check(compressor)
    except IncompatiblePartsError:
        return False
    return True


@app.command("list")
def list_parts(as_json: JsonOption = False) -> None:
    """All parts by name, those of installed plugins included."""
    catalogue = {kind: [describe(kind, name) for name in module.names()] for kind, module in KINDS.items()}
    if as_json:
        typer.echo(json.dumps(catalogue))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("kind", "name", "knobs", "what it does"):
        table.add_column(heading)
    for kind, parts in catalogue.items():
        for part in parts:
            table.add_row(kind, f"[bold]{part['name']}[/]", ", ".join(k["name"] for k in part["knobs"]), part["summary"])
    Console().print(table)


@app.command()
def show(name: str, as_json: JsonOption = False) -> None:
    """One part: what it computes and sends, its knobs, what it goes with."""
    found = [describe(kind, name) for kind, module in KINDS.items() if name in module.names()]
    if not found:
        nearest: list[str] = []
        for module in KINDS.values():
            try:
                module.get(name)
            except UnknownPartError as error:
                nearest += error.nearest
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        typer.echo(f"no part named {name!r}{hint} `grace-ext list` prints all.", err=True)
        raise typer.Exit(2)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    for part in found:
        console.print(f"[bold]{part['kind']} {part['name']}[/]\n")
        console.print(part["text"], markup=False, highlight=False)
        for knob in part["knobs"]:
            console.print(f"\n  [bold]{knob['name']}[/] = {knob['default']!r}", highlight=False, end="")
            console.print(f"   {knob['range']}\n      {knob['help']}", markup=False, highlight=False, end="")
        if "communicators" in part:
            traits = [p.replace("_", " ") for p, value in part["properties"].items() if value]
            console.print(f"\n\nCommunicators: {', '.join(part['communicators'])}.  Properties: {', '.join(traits) or 'none'}.", end="")
        console.print("\n")


@app.command("check")
def check_installation(
    as_json: JsonOption = False,
    run: Annotated[bool, typer.Option(help="Run the two-rank self-checks.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Fail too where an engine is missing or built for other versions.")] = False,
) -> None:
    """What is installed, what was built with what, and a two-rank exchange on every engine that is here."""
    console = Console(stderr=as_json)
    report = check.versions()
    if not as_json:
        _print_versions(console, report)
    report["checks"] = []
    for job in check.jobs() if run else []:
        if job.missing:
            outcome = {"name": job.name, "ok": None, "detail": job.missing}
        else:
            with console.status(f"{job.name} ..."):
                outcome = check.run(job)
        report["checks"].append(outcome)
        if not as_json:
            mark = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[yellow]not here[/]"}[outcome["ok"]]
            console.print(f"  {outcome['name']:<32} {mark}  ", end="")
            console.print(outcome["detail"], markup=False, highlight=False)
    report["ok"] = check.verdict(report, strict)
    if as_json:
        typer.echo(json.dumps(report))
    raise typer.Exit(0 if report["ok"] else 1)


def _print_versions(console: Console, report: dict[str, Any]) -> None:
    for name, version in report["packages"].items():
        console.print(f"  {name:<16} {version or '-'}", highlight=False)
    built = report["horovod_built"]
    if built:
        console.print("  Horovod was built with " + ", ".join(f"{k} {v}" for k, v in built.items()), highlight=False)
    for problem in report["problems"]:
        console.print(f"  [yellow]{problem}[/]")
    console.print()


def main() -> None:
    """Entry point: errors of ours are one line, not a trace."""
    try:
        app()
    except GraceError as error:
        typer.echo(f"grace-ext: {error}", err=True)
        raise SystemExit(2) from None
