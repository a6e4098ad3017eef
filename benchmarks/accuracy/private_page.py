"""Draws and writes what private.py has measured: the heat map of accuracy, spec by epsilon, and the table of docs/privacy.md."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BEGIN, END = "<!-- begin: benchmarks/accuracy/private.py -->", "<!-- end -->"


def _order(spec: str) -> str:
    """Says in words what happens in which order."""
    if "support" in spec:
        return "random support, clip, noise"
    if spec == "none":
        return "clip, noise"
    return "clip, noise, compression" + (" with error feedback" if "residual" in spec else "")


def draw(found: dict[str, Any], file: Path) -> None:
    """Draws the heat map of the mean accuracies into this PNG file."""
    specs, epsilons = list(found["results"]), list(next(iter(found["results"].values())))
    values = [[found["results"][spec][epsilon]["accuracy"] for epsilon in epsilons] for spec in specs]
    figure, axes = plt.subplots(figsize=(2.6 + 1.1 * len(epsilons), 1 + 0.34 * len(specs)), layout="constrained")
    axes.imshow(values, cmap="viridis", aspect="auto", vmin=min(map(min, values)), vmax=max(map(max, values)))
    middle = (min(map(min, values)) + max(map(max, values))) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if value < middle else "black")
    axes.set_xticks(range(len(epsilons)), [f"epsilon {'∞' if e == 'inf' else e}" for e in epsilons], fontsize=8)
    axes.set_yticks(range(len(specs)), specs, fontsize=7)
    axes.set_title("accuracy (%) under differential privacy", fontsize=9)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)


def table(found: dict[str, Any]) -> str:
    """Returns the table in Markdown: means, and the distance of the seeds from them."""
    results = found["results"]
    epsilons = list(next(iter(results.values())))
    names = ["no noise" if e == "inf" else f"epsilon {e}" for e in epsilons]
    lines = [f"| spec | order | {' | '.join(names)} | times smaller |", "|---|---|" + "---|" * (len(epsilons) + 1)]
    for spec, row in results.items():
        cells = [f"{row[e]['accuracy']:.1f} ± {statistics.pstdev(row[e]['accuracies']):.1f}" for e in epsilons]
        smaller = results["none"][epsilons[0]]["bytes"] / row[epsilons[0]]["bytes"]
        lines.append(f"| `{spec.replace('|', chr(92) + '|')}` | {_order(spec)} | {' | '.join(cells)} | {smaller:.1f} |")
    return "\n".join(lines)


def write(found: dict[str, Any], page: Path) -> None:
    """Writes the table into this page, between its two marks."""
    text = page.read_text()
    if BEGIN not in text:
        raise SystemExit(f"{page} has no line {BEGIN!r}, behind which the table goes")
    page.write_text(re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: f"{BEGIN}\n{table(found)}\n{END}", text, flags=re.DOTALL))
