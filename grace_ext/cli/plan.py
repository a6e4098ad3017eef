"""Defines `grace-ext plan`: its options and its output."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from ..errors import ModelError, ParameterError, UnsupportedError

if TYPE_CHECKING:
    from ..planning.host import HostCopies
    from ..planning.plan import Recommendation
    from ..planning.shapes import Shapes
    from ..planning.trace import Taken, Trace

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
MODEL = 'A JSON file of shapes, {"name": \\[dims...]}, or module:callable that returns a torch or Keras model.'
SPECS = "Specs to compare with dense, a compressor without a memory with its natural one; default: a few that keep accuracy."
RATES = "100mbit, 2.5gbit, '1 Gbit/s', '125 MB/s', ... (b: bits, B: bytes)"
MEASURE = (
    "Measure the network of the job that this command runs in: horovodrun -np 8 grace-ext plan ..., mpirun -n 8 grace-ext plan ..., or "
    "torchrun --no-python ... grace-ext plan ... (horovodrun prefixes each line of stdout with the rank: for --json use another launcher)."
)
HOST_COPY = (
    "Rate at which one GPU copies to the host, and back, while all GPUs of its node do, given like --rate: adds the copies to each step. "
    "For gradients on GPUs in TensorFlow and, with --copied collectives, in torch over Gloo (docs/planning.md). Default: no copies."
)
COPIED = (
    "With --host-copy: 'gradients', copied by every spec but dense (TensorFlow; the default), or 'collectives', of which every spec, dense "
    "too, copies what it sends and receives (torch over Gloo, or Horovod without NCCL)."
)
PICTURES = (".png", ".svg", ".pdf")
#: The options that --measure replaces by measurements, with the values that mean that the user did not give them.
STATED = {"rate": None, "latency": "50us", "workers": None, "workers_per_node": 1, "inside": "20gbit", "fresh": False}


def seconds(text: str) -> float:
    """Returns the seconds of a time given as text, such as '50us' or '1.5ms'. Raises ParameterError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text.strip().lower())
    if not found:
        raise ParameterError(f"a time is a number and one of {', '.join(SECONDS)}, such as 50us or 1.5ms, got {text!r}")
    return float(found[1]) * SECONDS[found[2]]


def plan(
    model: Annotated[str, typer.Argument(help=MODEL)],
    specs: Annotated[list[str] | None, typer.Argument(help=SPECS)] = None,
    rate: Annotated[str | None, typer.Option(help=f"Rate of each node's link: {RATES}.")] = None,
    latency: Annotated[str, typer.Option(help="Latency per message, software included.")] = "50us",
    workers: Annotated[int | None, typer.Option(min=2, help="Number of workers that exchange gradients.")] = None,
    workers_per_node: Annotated[int, typer.Option(min=1, help="Number of workers that share a node's link.")] = 1,
    inside: Annotated[str, typer.Option(help="Rate between the workers of one node, given like --rate.")] = "20gbit",
    compute_ms: Annotated[float, typer.Option(min=0, help="Time of a forward and backward pass; the exchange may overlap it.")] = 0.0,
    host_copy: Annotated[str | None, typer.Option(help=HOST_COPY)] = None,
    copied: Annotated[str | None, typer.Option(help=COPIED)] = None,
    measure: Annotated[bool, typer.Option("--measure", help=MEASURE)] = False,
    exchanges: Annotated[int, typer.Option(min=0, help="With --measure: how many candidates to really exchange, besides dense.")] = 3,
    fresh: Annotated[bool, typer.Option("--fresh", help="Time the codecs again, even if their times are in the cache.")] = False,
    picture: Annotated[Path | None, typer.Option(help="File to draw simulated scaling curves to, for up to 4,096 workers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Predicts what compression gains for a model on a network: step times of candidates, at what rates each pays, and which to use.

    Codecs are timed on this machine, in one thread, on the model's own shapes, and their times are kept in a cache. The network is given by
    options, or measured in your own job (--measure), with a few real exchanges. Only speed is compared: docs/accuracy.md tells what each
    spec does to accuracy.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy reads it once, when it is loaded
        os.execve(sys.executable, [sys.executable, "-m", "grace_ext", *sys.argv[1:]], {**os.environ, "OMP_NUM_THREADS": "1"})
    from ..exchange.perform import perform
    from ..planning import plan as planning
    from ..planning.cached import traces
    from ..planning.candidates import candidates, completions
    from ..planning.cost import Link
    from ..planning.models import shapes_of
    from ..planning.network import INSIDE, OnLink

    said = {"rate": rate, "latency": latency, "workers": workers, "workers_per_node": workers_per_node, "inside": inside, "fresh": fresh}
    check_options(said, measure, compute_ms)
    if not measure:
        check_picture(picture)
    shapes = shapes_of(model)
    host = host_copies(host_copy, copied, shapes)
    console = Console(stderr=True)
    with ExitStack() as stack, memory_enough(model):
        status = stack.enter_context(console.status("reading the model"))
        tell = lambda text: status.update(f"timing {text}")  # noqa: E731
        document: dict[str, Any] = {"model": model, "tensors": len(shapes)}
        if measure:
            from ..frameworks.launched import transport
            from ..planning.measure import probed, rows_of
            from ..planning.probe import Probe

            here = stack.enter_context(transport())
            if here.size < 2:
                raise UnsupportedError("--measure needs a job of two ranks or more: start one, or give --rate and --workers instead")
            if here.rank == 0:  # only rank 0 draws, so the folder need not exist on other hosts
                check_picture(picture)
            chosen = candidates(specs or (), here.size)
            effects = probed(Probe(here), chosen, shapes, compute=compute_ms / 1000, exchanges=exchanges, tell=tell, host=host)
            made, network, _ = found = perform(effects, here, {})
            rows = rows_of(found)
            link, first = network.link, here.rank == 0
            document["collectives"] = network.points
        else:
            assert rate is not None and workers is not None
            link, first = Link.of(rate, seconds(latency)), True
            if workers % workers_per_node:
                raise ParameterError(f"{workers} workers do not fill nodes of {workers_per_node}: give a multiple of it")
            chosen = candidates(specs or (), workers, workers_per_node)
            recorded = traces(chosen, shapes, fresh=fresh, tell=tell)
            within = Link.of(inside, INSIDE.latency)
            made = planning.Model(recorded, workers, per_node=workers_per_node, inside=within, compute=compute_ms / 1000, host=host)
            rows = made.rows(OnLink(link, workers_per_node, within), link)
    if not first:
        return
    advice = planning.advise(rows)
    per_node = None if measure else made.per_node  # a measurement shows the network, not which ranks share a node
    document |= {"workers": made.n, "workers_per_node": per_node, "compute_ms": compute_ms, "link": asdict(link), **asdict(advice)}
    document["codecs"] = {spec: codec(trace.taken) for spec, trace in made.traces.items()}
    document["host_copy"] = None if host is None else asdict(host)
    document["notices"] = [*completions(specs or ()), *on_host(host, made.dense), *busy(made.traces, measure)]
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        report(advice, document)
    if picture:
        from ..planning.picture import draw

        draw(made, link, advice, picture, fitted=measure)


def check_options(said: dict[str, Any], measure: bool, compute_ms: float) -> None:
    """Raises ParameterError if options cannot be combined. said: the values of the options in STATED."""
    extra = [f"--{name.replace('_', '-')}" for name, value in said.items() if value != STATED[name]]
    if measure and extra:
        raise ParameterError(f"--measure measures network, workers and codecs in the job; leave out {', '.join(extra)}")
    if not measure and (said["rate"] is None or said["workers"] is None):
        raise ParameterError("plan needs --rate and --workers of the network, or --measure in a running job")
    if not math.isfinite(compute_ms):
        raise ParameterError(f"--compute-ms must be a number of milliseconds, got {compute_ms}")


def host_copies(rate: str | None, copied: str | None, shapes: Shapes) -> HostCopies | None:
    """Returns the copies between GPU and host that --host-copy and --copied describe; None without --host-copy. Raises ParameterError."""
    from ..planning.cost import rate_of
    from ..planning.host import HostCopies
    from ..planning.shapes import specs_of

    if rate is None:
        if copied is not None:
            raise ParameterError("--copied says what is copied between GPU and host: give the rate of these copies, too, by --host-copy")
        return None
    return HostCopies(rate_of(rate), copied or "gradients", sum(spec.nbytes for spec in specs_of(shapes)))


def on_host(host: HostCopies | None, dense: str) -> list[str]:
    """Returns a sentence about who copies gradients to the host, if any spec does."""
    if host is None or host.copied != "gradients":
        return []
    return [
        f"every spec but {dense} copies {host.nbytes / 1e6:.4g} MB of gradients to the host and {host.nbytes / 1e6:.4g} MB back; {dense} "
        "stands for Horovod's own operations with NCCL, which copy nothing, while 'none' in grace_ext copies like the others"
    ]


def check_picture(picture: Path | None) -> None:
    """Raises ParameterError if the picture cannot be written."""
    if picture and not (picture.suffix.lower() in PICTURES and picture.parent.is_dir()):
        raise ParameterError(f"cannot write the picture {str(picture)!r}: it must end in {', '.join(PICTURES)}, in an existing folder")


@contextmanager
def progress() -> Iterator[Progress]:
    """Shows bars on stderr, with the time that has passed."""
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar


@contextmanager
def memory_enough(model: str) -> Iterator[None]:
    """Turns a MemoryError into a ModelError that names the model."""
    try:
        yield
    except MemoryError as error:
        raise ModelError(f"{model!r} is too large to time codecs on gradients of its shapes in this machine's memory: {error}") from error


def codec(taken: Taken) -> dict[str, Any]:
    """Returns, in JSON types, how long ago a codec was timed, and how much that can be trusted (see trace.Taken)."""
    return {"age_s": max(0.0, time.time() - taken.at), "spread": taken.spread, "load": taken.load}


def busy(traces: Mapping[str, Trace], measure: bool) -> list[str]:
    """Returns a sentence if the machine was busy when it timed some codecs. In a job, other ranks load it, as they do in training."""
    found = [spec for spec, trace in traces.items() if (replace(trace.taken, load=None) if measure else trace.taken).busy]
    if not found:
        return []
    taken = [traces[spec].taken for spec in found]
    spread, load = max(its.spread or 0.0 for its in taken), max(its.load or 0.0 for its in taken)
    seen = f"a load of {load:.1f} per processor, and steps that differed by {100 * spread:.0f}%"
    what = "run this again when it is idle" if measure else "stop other programs, and run this again with --fresh"
    return [f"this machine was busy when it timed {len(found)} of {len(traces)} codecs ({seen}), so the work may be wrong: {what}"]


def ago(seconds: float) -> str:
    """Returns an age in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now" if seconds < 10 else f"{seconds:.0f} seconds ago"


def timed(codecs: Mapping[str, Any], measure: bool) -> str:
    """Returns when the codecs were timed, and how much their steps differed, in words."""
    ages, spreads = [its["age_s"] for its in codecs.values()], [its["spread"] for its in codecs.values() if its["spread"] is not None]
    when = ago(max(ages)) if ago(min(ages)) == ago(max(ages)) else f"{ago(max(ages))} to {ago(min(ages))}"
    differed = f", in steps that differed by up to {100 * max(spreads):.0f}%" if spreads else ""
    return f"Codecs were timed {when}{differed}" + ("." if measure else "; --fresh times them again.")


def report(advice: Recommendation, document: dict[str, Any]) -> None:
    """Prints the table and the advice."""
    from ..planning.cost import rate_text

    console, link = Console(), document["link"]
    console.width = max(console.width, 120)  # specs are long
    measured, host = any(row.measured_ms for row in advice.rows), document["host_copy"]
    table = Table(box=None, pad_edge=False)
    headings = ["spec", "sent per worker", "step", "gain", "work", "network", *(["copies"] if host else []), "pays"]
    headings += ["measured"] if measured else []
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "spec" else "right")
    for row in sorted(advice.rows, key=lambda row: row.step_ms):
        even = "-" if row.spec == advice.rows[0].spec else " ".join([row.pays, *([rate_text(row.break_even)] if row.break_even else [])])
        seen = [] if not measured else [f"{row.measured_ms:.4g} ms" if row.measured_ms else "-"]
        copies = [f"{row.copy_ms:.4g} ms"] if host else []
        cells = (f"{row.step_ms:.4g} ms", f"x{row.gain:.2f}", f"{row.work_ms:.4g} ms", f"{row.network_ms:.4g} ms", *copies, even)
        style = "bold" if row.spec == advice.spec else None
        table.add_row(row.spec, f"{row.nbytes / 1e6:.4g} MB", *cells, *seen, style=style)
    console.print(table)
    at = f"a link of {rate_text(link['rate'])}, {1e6 * link['latency']:.4g} us per message, {1e6 * link['overhead']:.4g} us per collective"
    per_node = document["workers_per_node"]
    among = f", {per_node} per node; {at}" if per_node else f" of this job; its network was measured: about {at}"
    console.print(f"\n{document['workers']} workers{among}", style="dim", highlight=False)
    console.print("work: encoding and decoding; network: all collectives, one after another; the two overlap if possible.", style="dim")
    if host:
        at = f"{host['rate'] / 8e9:.4g} GB/s in each direction, and overlap with nothing; measured exchanges are without them"
        console.print(f"copies: of {host['copied']}, between GPU and host, at {at}.", style="dim", highlight=False)
    console.print("pays: the link rates at which it is faster than dense. Accuracy is not compared: see docs/accuracy.md.", style="dim")
    console.print(timed(document["codecs"], not per_node), style="dim", highlight=False)
    for notice in document["notices"]:
        console.print(f"Note: {notice}.", style="yellow", highlight=False, markup=False)
    console.print(f"\n[bold]{advice.spec}[/]: {advice.reason}.", highlight=False)
