"""Draws scores against bytes, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..planning.picture import pyplot, save
from .comparison import Row
from .task import Task


def draw(its: Task, rows: Sequence[Row], title: str, file: Path) -> None:
    """Writes the picture in the format of the file's extension. Raises UnsupportedError without matplotlib, and ParameterError if the file
    cannot be written."""
    plt = pyplot("examples")
    figure, axes = plt.subplots(figsize=(8, 4.2 + 0.14 * len(rows)), layout="constrained")
    names = list(dict.fromkeys(name_of(row.spec) for row in rows))
    for number, row in enumerate(rows, start=1):
        which = names.index(name_of(row.spec))
        axes.errorbar(
            row.nbytes, row.score, yerr=row.sd or 0, label=f"{number}  {row.spec}",
            fmt="os^Dv"[which // 10 % 5], color=f"C{which % 10}", markersize=5, capsize=2, linewidth=0.8,
        )  # fmt: skip
        axes.annotate(str(number), (row.nbytes, row.score), xytext=(4, 4), textcoords="offset points", fontsize=6)
    best = sorted((row for row in rows if row.front), key=lambda row: row.nbytes)
    axes.plot([row.nbytes for row in best], [row.score for row in best], color="black", linewidth=0.8, zorder=0, label="Pareto front")
    axes.set(xscale="log", xlabel="bytes per rank and step", ylabel=its.unit, title=title)
    if not its.higher_is_better:
        axes.invert_yaxis()  # better is always up
    axes.grid(True, alpha=0.3)
    figure.legend(fontsize=6, loc="outside lower center", ncols=1 + len(rows) // 12)
    save(figure, file)


def name_of(spec: str) -> str:
    """Returns the name that a spec begins with, which decides its colour."""
    return spec.partition("(")[0].partition(" ")[0]
