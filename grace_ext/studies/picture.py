"""Draws scores against bytes, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..planning.picture import pyplot, save
from .comparison import Row
from .task import Task

#: Of more rows than this, the legend names compressors, and only specs on the front have a label.
FEW = 16


def draw(its: Task, rows: Sequence[Row], title: str, file: Path) -> None:
    """Writes the picture in the format of the file's extension; better is up. An accuracy is drawn as the error that is left, on a
    logarithmic axis. Raises UnsupportedError without matplotlib, and ParameterError if the file cannot be written."""
    plt = pyplot("examples")
    few, percent = len(rows) <= FEW, its.unit == Task.unit
    figure, axes = plt.subplots(figsize=(9, 5.5 + 0.12 * min(len(rows), FEW)), layout="constrained")
    names = list(dict.fromkeys(name_of(row.spec) for row in rows))
    height = {row.spec: 100 - row.score if percent else row.score for row in rows}
    told = set()
    for number, row in enumerate(rows, start=1):
        which, name = names.index(name_of(row.spec)), name_of(row.spec)
        label = f"{number}  {row.spec}" if few else None if name in told else name
        told.add(name)
        axes.errorbar(
            row.nbytes, height[row.spec], yerr=row.sd or 0, label=label,
            fmt="os^Dv"[which // 10 % 5], color=f"C{which % 10}", markersize=5, capsize=2, linewidth=0.8 if few else 0.3,
        )  # fmt: skip
        if few or row.front:
            text = str(number) if few else row.spec.partition(" @")[0]
            axes.annotate(text, (row.nbytes, height[row.spec]), xytext=(4, 5), textcoords="offset points", fontsize=6)
    best = sorted((row for row in rows if row.front), key=lambda row: row.nbytes)
    axes.plot(
        [row.nbytes for row in best], [height[row.spec] for row in best], color="black", linewidth=0.8, zorder=0, label="Pareto front"
    )
    axes.set(xscale="log", xlabel="bytes per rank and step", ylabel="100 - accuracy, %" if percent else its.unit, title=title)
    if percent:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    if percent or not its.higher_is_better:
        axes.invert_yaxis()
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(fontsize=6, loc="outside lower center", ncols=1 if few else 8)
    save(figure, file)


def name_of(spec: str) -> str:
    """Returns the name that a spec begins with, which decides its colour."""
    return spec.partition("(")[0].partition(" ")[0]
