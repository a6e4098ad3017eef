"""Defines `grace-ext compare`: its options and its output."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..composition.making import grace
from ..errors import ParameterError, UnsupportedError
from ..planning.candidates import CANDIDATES, DENSE, completed, completions
from .plan import RATES, check_picture, progress, seconds

if TYPE_CHECKING:
    from ..studies.comparison import Row
    from ..studies.task import Task

SPECS = "Specs to compare with dense, a compressor without a memory with its natural one; default: a few that keep accuracy."
DATA = "mnist (a small CNN), charlm (a small Transformer on English text), or module:callable that returns a grace_ext.studies.task.Task."
TUNE = (
    "Multiples of the task's learning rate, such as 0.5,1,2: each spec is trained with the one that does best for it in a training with "
    "another seed. By default all use that of dense training."
)


def compare(
    specs: Annotated[list[str] | None, typer.Argument(help=SPECS)] = None,
    data: Annotated[str, typer.Option(help=DATA)] = "mnist",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per spec, with the seeds 0, 1, ...")] = 3,
    ranks: Annotated[int, typer.Option(min=1, help="Number of simulated ranks.")] = 2,
    tune: Annotated[str, typer.Option(help=TUNE)] = "1",
    rate: Annotated[str, typer.Option(help=f"Rate of each worker's link, for the predicted exchange: {RATES}.")] = "1gbit",
    latency: Annotated[str, typer.Option(help="Latency per message, for the predicted exchange.")] = "50us",
    workers: Annotated[int, typer.Option(min=2, help="Number of workers, for the predicted exchange.")] = 8,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings that run side by side; default: one per core.")] = None,
    picture: Annotated[Path | None, typer.Option(help="File to draw scores against bytes to (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Trains one task with each spec, under the same settings, and compares accuracy, bytes and times.

    Times are those to encode and decode on this machine, and that of the exchange, predicted for the network that --rate, --latency and
    --workers describe. All specs see the same initial weights, examples and learning rate (or the best of several, --tune). Ranks are
    simulated in one process, which gives the results of real ranks. One training of mnist takes about 4 s of a core, of charlm 8 s.
    """
    check_picture(picture)
    multiples = multiples_of(tune)
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError("grace-ext compare trains models, for which it needs torch: pip install 'grace_ext[torch,examples]'")
    import torch

    from ..planning.cost import Link
    from ..studies import comparison
    from ..studies.task import task
    from ..studies.training import amount, batches, check, optimizer_for

    torch.set_num_threads(1)  # encoding and decoding are timed here, in one thread as everywhere else
    link, compared = Link.of(rate, seconds(latency)), texts(specs or CANDIDATES)
    for text in compared:
        check(grace(text))
    its = task(data)
    next(batches(its, 0, ranks))  # this and the next line raise errors that would else come after minutes of training
    for text in compared:
        optimizer_for(grace(text), its.model(), its, its.lr)
    with progress() as bar:
        training = bar.add_task("training", total=amount(compared, range(seeds), multiples))
        rows = comparison.compare(
            data, compared, seeds=seeds, ranks=ranks, rates=multiples, jobs=jobs, link=link, workers=workers,
            tick=lambda done: bar.update(training, advance=done), tell=lambda text: bar.update(training, description=f"timing {text}"),
        )  # fmt: skip
    document = {
        "data": data, "unit": its.unit, "higher_is_better": its.higher_is_better, "seeds": seeds, "ranks": ranks, "steps": its.steps,
        "batch": its.batch, "rates": multiples, "workers": workers, "link": asdict(link),
        "rows": [plain(asdict(row)) for row in rows], "notices": completions(specs or ()),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        report(its, rows, document)
    if picture:
        from ..studies.picture import draw

        draw(its, rows, f"{data}, {ranks} ranks, {its.steps} steps, {seeds} seeds", picture)


def multiples_of(text: str) -> list[float]:
    """Returns the numbers of a list such as '0.5,1,2'. Raises ParameterError."""
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < each < math.inf for each in found):
        raise ParameterError(f"--tune takes positive numbers with commas between them, such as 0.5,1,2, got {text!r}")
    return found


def texts(specs: Sequence[str]) -> list[str]:
    """Returns full specs, each once, dense first. Raises an error for the first one that is not valid."""
    return list(dict.fromkeys(str(completed(text)) for text in (DENSE, *specs)))


def plain(value: Any) -> Any:
    """Returns a value without numbers that JSON lacks: None in place of those that are not finite."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(its: Task, rows: Sequence[Row], document: dict[str, Any]) -> None:
    """Prints the table, best scores first."""
    from ..planning.cost import rate_text

    console = Console()
    console.width = max(console.width, 120)  # specs are long
    table = Table(box=None, pad_edge=False)
    for heading in ("spec", its.unit, "bytes/step", "smaller", "encode", "decode", "exchange", "lr"):
        table.add_column(heading, justify="left" if heading == "spec" else "right")
    for row in sorted(rows, key=lambda row: (math.isnan(row.score), -row.score if its.higher_is_better else row.score)):
        spread = "" if row.sd is None else f" ± {row.sd:.2f}"
        score = "diverged" if math.isnan(row.score) else f"{row.score:.2f}{spread}"
        times = ("-" if ms is None else f"{ms:.3g} ms" for ms in (row.encode_ms, row.decode_ms, row.exchange_ms))
        star = "*" if row.front else " "
        table.add_row(f"{star} {row.spec}", score, f"{row.nbytes:,.0f}", f"x{row.smaller:.1f}", *times, f"{row.rate:g}")
    console.print(table)
    rates = document["rates"]
    tuned = f", the best of {len(rates)} learning rates per spec" if len(rates) > 1 else ", the learning rate of dense training"
    console.print(
        f"\n{document['data']}: {its.steps} steps, {document['ranks']} ranks with {its.batch} examples each{tuned}; mean and standard "
        f"deviation of {document['seeds']} seeds.",
        style="dim",
        highlight=False,
    )
    console.print("*: on the Pareto front: no other spec has as good a score for fewer bytes.", style="dim")
    console.print(
        f"encode, decode: of one rank per step, on this machine. exchange: predicted, {document['workers']} workers on links of "
        f"{rate_text(document['link']['rate'])}; '-' if the spec changes from step to step.",
        style="dim",
        highlight=False,
    )
    for notice in document["notices"]:
        console.print(f"Note: {notice}.", style="yellow", highlight=False, markup=False)
