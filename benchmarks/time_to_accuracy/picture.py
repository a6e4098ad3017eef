"""Draws the score over the seconds of training: one panel per task, one line per spec (its first seed), and the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw(head: dict[str, Any], rows: list[dict[str, Any]], file: Path) -> None:
    names = [name for name in head["tasks"] if any(row["task"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(names), figsize=(7 * len(names), 4.5), squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        task, first = head["tasks"][name], min(row["seed"] for row in rows if row["task"] == name)
        for row in (row for row in rows if row["task"] == name and row["seed"] == first):
            _, seconds, scores = zip(*row["curve"], strict=True)
            axes.plot(seconds, scores, marker=".", label=row["spec"], color="black" if row["spec"] == "dense" else None)
        axes.axhline(task["target"], linestyle=":", color="gray", label="target")
        axes.set(xscale="log", xlabel=f"seconds of training, {head['ranks']} hosts, {head['rate']}/s", ylabel=task["unit"], title=name)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)
