"""The command line `grace-ext list | show NAME | check | bench | compare | plan | privacy | papers | compile`. With --json a command
prints one document on stdout, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from .._version import __version__
from ..errors import Afterwards, GraceError, UnknownPartError
from ..parts.spec import named_by
from . import check
from .catalogue import KINDS, describe
from .compare import compare
from .papers import papers
from .plan import plan
from .privacy import privacy

HELP = "Gradient compression for data-parallel training."
app = typer.Typer(add_completion=False, no_args_is_help=True, help=HELP, pretty_exceptions_enable=False)
BENCHED = "Specs to time, a compressor without a memory with its natural one; default: every compressor."
SHOWN = "A part's name, with knobs if you like: topk, 'topk(ratio=0.1)'; or a spec, whose parts are shown."
#: What the system says if a file cannot be written: the device is full, broken or read-only, or a quota is used up.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"grace-ext {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command("list")
def list_parts(as_json: JsonOption = False) -> None:
    """Lists all parts by name, also those of installed plugins."""
    catalogue = {kind: [describe(module.get(name).create()) for name in module.names()] for kind, module in KINDS.items()}
    if as_json:
        typer.echo(json.dumps(catalogue))
        return
    console = Console()
    for kind, parts in catalogue.items():
        title = KINDS[kind].__name__.rpartition(".")[2]
        table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold underline")
        sized = kind == "compressor"
        for heading in ("name", *(["bits"] if sized else []), "knobs", "what it does"):
            table.add_column(heading, justify="right" if heading == "bits" else "left")
        for part in parts:
            bits = [f"{part['bits_per_element']:.3g}"] if sized else []
            knobs = ", ".join(f"{k['name']}={k['default']}" for k in part["knobs"])
            table.add_row(f"[bold]{part['name']}[/]", *bits, knobs, part["summary"])
        console.print(table)
        console.print()
    note = "bits: on the wire per element of a 1000 x 1000 gradient, with the default knobs (an upper bound if the size varies)."
    console.print(note, style="dim")


@app.command()
def show(part: Annotated[str, typer.Argument(help=SHOWN)], as_json: JsonOption = False) -> None:
    """Shows a part: what it computes and sends, its knobs, and the parts that it can be combined with."""
    try:
        found = [describe(named) for named in named_by(part)]
    except UnknownPartError as error:
        hint = f"; did you mean {' or '.join(error.nearest)}?" if error.nearest else "."
        typer.echo(f"no {error.kind} named {error.name!r}{hint} `grace-ext list` lists all parts.", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    for described in found:
        console.print(f"{described['kind']} {described['spec']}\n", style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(described["text"], markup=False, highlight=False, soft_wrap=True)
        for knob in described["knobs"]:
            console.print(f"\n  [bold]{knob['name']}[/] = ", highlight=False, end="")
            default = "" if knob["value"] == knob["default"] else f" (default {knob['default']!r})"
            console.print(f"{knob['value']!r}{default}   {knob['range']}\n      {knob['help']}", markup=False, highlight=False, end="")
        console.print("\n")
        for label, value in facts(described):
            console.print(f"[bold]{label}:[/] ", end="")
            console.print(value, markup=False, highlight=False)
        console.print()


def facts(part: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (label, text) pairs for what a part declares of itself."""
    found = []
    if part["kind"] == "compressor":
        which = "the default" if part["spec"] == part["name"] else "these"
        found.append(("On the wire", f"{part['bits_per_element']:.4g} bits per element of a 1000 x 1000 gradient, with {which} knobs"))
        natural = part["natural"]
        found.append(("Recommended", f"{part['spec']} + {natural['memory']} @ {natural['communicator']}"))
    for kind in ("compressors", "memories", "communicators"):
        if kind in part:
            found.append((f"Compatible {kind}", ", ".join(part[kind]) or "none"))
    traits = [name.replace("_", " ") for name, value in part["properties"].items() if value]
    return [*found, ("Properties", ", ".join(traits))] if traits else found


@app.command("check")
def check_installation(
    as_json: JsonOption = False,
    run: Annotated[bool, typer.Option(help="Run the two-rank exchanges.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Fail also if an engine is missing or was built for other versions.")] = False,
) -> None:
    """Shows versions, and the versions that Horovod was built with; tests a two-rank exchange on each installed engine."""
    console = Console(stderr=as_json)
    report = check.versions()
    if not as_json:
        _print_versions(console, report)
    report["checks"] = []
    for job in check.jobs() if run else []:
        if job.missing:
            outcome: dict[str, Any] = {"name": job.name, "ok": None, "detail": job.missing}
        else:
            with console.status(f"{job.name} ..."):
                outcome = check.run(job)
        report["checks"].append(outcome)
        if not as_json:
            mark = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[yellow]skipped[/]"}[outcome["ok"]]
            console.print(f"  {outcome['name']:<32} {mark}  ", end="")
            console.print(outcome["detail"], markup=False, highlight=False)
    report["ok"] = check.verdict(report, strict)
    if as_json:
        typer.echo(json.dumps(report))
    raise typer.Exit(0 if report["ok"] else 1)


@app.command("bench")
def bench_parts(
    specs: Annotated[list[str] | None, typer.Argument(help=BENCHED)] = None,
    elements: Annotated[int, typer.Option(min=4, help="Number of elements of the gradient.")] = 25_000_000,
    times: Annotated[int, typer.Option(min=1, help="Steps to time, after two warm-up steps.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Times specs on this machine, in one thread, in multiples of a copy of the gradient; also prints bytes sent and the error."""
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy reads it once, when it is loaded
        os.execve(sys.executable, [sys.executable, "-m", "grace_ext", *sys.argv[1:]], {**os.environ, "OMP_NUM_THREADS": "1"})
    from ..planning import bench
    from ..planning.candidates import completions

    notices = completions(specs or ())  # reports a mistake before anything is measured
    texts, done = specs or list(KINDS["compressor"].names()), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(texts))
        for text, row in zip(texts, bench.rows(texts, elements, times), strict=True):
            progress.update(task, advance=1, description=text)
            done.append(row)
    if as_json:
        typer.echo(json.dumps({"machine": bench.machine(), "rows": [asdict(row) for row in done], "notices": notices}))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("spec", "elements", "encode", "decode per rank", "bytes/element", "error"):
        table.add_column(heading, justify="left" if heading == "spec" else "right")
    for row in done:
        times_ = (f"{row.encode:.1f}x", f"{row.decode:.1f}x" if row.decode else "-")
        table.add_row(row.spec, f"{row.elements:,}", *times_, f"{row.bytes_per_element:.4g}", f"{row.error:.3g}")
    console = Console()
    console.print(table)
    console.print(f"x: multiples of a copy of the gradient, {done[-1].copy_ms:.1f} ms for {done[-1].elements:,} elements", style="dim")
    for notice in notices:
        console.print(f"Note: {notice}.", style="yellow", highlight=False, markup=False)


app.command("compare")(compare)
app.command("plan")(plan)
app.command("privacy")(privacy)
app.add_typer(papers, name="papers")


@app.command("compile")
def compile_kernels(
    into: Annotated[Path | None, typer.Option(help="The folder that GRACE_EXT_CACHE will name; default: the user's cache.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compiles the kernels before they are needed, for example into a container's image.

    They are of use on the same kind of processor only; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name another one."""
    from ..arrays import kernels
    from ..arrays.kernels.cache import target

    folder = into or kernels.cache_folder()
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:-1], TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        kept = kernels.prebuild(folder, lambda done, total: progress.update(task, completed=done, total=total))
    processor = target()[1]
    if as_json:
        typer.echo(json.dumps({"cache": str(folder.absolute()), "kernels": str(kept), "processor": processor}))
        return
    typer.echo(f"The kernels for {processor} are in {kept}. Set GRACE_EXT_CACHE={folder.absolute()} where they are used.")


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
    """Runs the command line. A GraceError, or output that cannot be written, is printed as one line, without a traceback."""
    try:
        with Afterwards(lambda: sys.stdout.flush()):
            app()
    except GraceError as error:
        typer.echo(f"grace-ext: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries to write it once more when it ends
        where = f" to {error.filename}" if error.filename else ""
        typer.echo(f"grace-ext: the output cannot be written{where}: {error.strerror}", err=True)
        raise SystemExit(1) from None
