"""Draws PNG pictures of the results of exchange.py and cost_model.py, from their JSON alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"horovod": "#777777", "ddp": "#b0a060", "grace": "#c05050", "ours": "#3070b0", "ours-ddp": "#60a0d0", "tensorflow": "#50a070"}
LABELS = {
    "horovod": "Horovod", "ddp": "torch DDP and its hooks", "grace": "GRACE", "ours": "grace_ext over Horovod",
    "ours-ddp": "grace_ext in DDP", "tensorflow": "TensorFlow",
}  # fmt: skip


def exchange_files(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns file name -> cells: one picture per model and number of hosts, with one panel per rate."""
    files: dict[str, list[dict[str, Any]]] = {}
    for key, cell in results["cells"].items():
        if cell["complete"] and cell["dense_ms"]:
            kind = key.split("/")[3:]
            files.setdefault("-".join(["exchange", cell["model"], str(cell["hosts"]), *kind]) + ".png", []).append(cell)
    return files


def draw_exchange(results: dict[str, Any], folder: Path) -> list[str]:
    """Draws bars of the time relative to dense Horovod, on a logarithmic scale. Returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = exchange_files(results)
    for file, cells in files.items():
        cells = sorted(cells, key=lambda cell: RATE_ORDER.get(cell["rate"], 0))
        names = list(dict.fromkeys(name for cell in cells for name, s in cell["systems"].items() if s["outcome"] == "completes"))[::-1]
        size = (3.2 + 3 * len(cells), 1.2 + 0.22 * len(names))
        figure, rows = plt.subplots(1, len(cells), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, cell in zip(rows[0], cells, strict=True):
            _bars(axes, cell, names)
        used = {cell["systems"][name]["group"] for cell in cells for name in names if name in cell["systems"]}
        handles = [matplotlib.patches.Patch(color=COLOURS[group], label=LABELS[group]) for group in COLOURS if group in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False)
        figure.suptitle(f"{cells[0]['model']}, {cells[0]['hosts']} hosts: time of an exchange, dense Horovod = 1", fontsize=10)
        figure.savefig(folder / file, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return list(files)


RATE_ORDER = {"100mbit": 1, "1gbit": 2, "10gbit": 3}


def _bars(axes: Any, cell: dict[str, Any], names: list[str]) -> None:
    dense = statistics.mean(cell["dense_ms"])
    ratios = [seen["ms"] / dense for seen in cell["systems"].values() if seen["outcome"] == "completes" and seen["ms"] > 0]
    least = min(0.01, *(0.7 * ratio for ratio in ratios))
    for place, name in enumerate(names):
        seen = cell["systems"].get(name, {})
        if seen.get("outcome") == "completes" and seen["ms"] > 0:
            ratio = seen["ms"] / dense
            axes.barh(place, ratio, color=COLOURS[seen["group"]], height=0.75)
            axes.text(ratio, place, f" {ratio:.2g}", va="center", fontsize=6)
        elif seen:
            axes.text(least, place, f" {seen['outcome']}", va="center", fontsize=6, color="#c05050")
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xlim(least, 2.2 * max(1, *ratios))
    _plain(axes.xaxis, [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(y=0.01)
    axes.set_title(f"{cell['rate']}: dense takes {dense:,.0f} ms", fontsize=8)


def _plain(axis: Any, ticks: list[float]) -> None:
    """Labels these ticks of a logarithmic axis with plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_ticks([tick for tick in ticks if low <= tick <= high], [f"{tick:g}" for tick in ticks if low <= tick <= high])
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def draw_cost(cost: dict[str, Any], folder: Path) -> str:
    """Draws the speed-up over dense Horovod by number of workers; dots are measurements. Returns the name of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = cost["extrapolated"]
    figure, rows = plt.subplots(1, len(rates), figsize=(2 + 3.3 * len(rates), 4.2), sharey=True, squeeze=False, layout="constrained")
    for axes, (rate, table) in zip(rows[0], rates.items(), strict=True):
        dense = table["ms"]["Horovod"]
        for number, (name, by_n) in enumerate((name, ms) for name, ms in table["ms"].items() if name != "Horovod"):
            style = {"color": plt.get_cmap("tab20")(number), "label": name}
            axes.plot([int(n) for n in by_n], [dense[n] / by_n[n] for n in by_n], linewidth=1, **style)
            _dots(axes, cost["compared"], rate, name, style["color"])
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set(xscale="log", yscale="log", xlabel="workers", title=rate)
        axes.minorticks_off()
        _plain(axes.xaxis, [2, 8, 32, 128, 1024])
    _plain(rows[0][0].yaxis, [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])
    rows[0][0].set_ylabel("times faster than dense Horovod")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(folder / "cost.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return "cost.png"


def _dots(axes: Any, rows: list[dict[str, Any]], rate: str, name: str, colour: Any) -> None:
    measured = {(row["system"], row["hosts"]): row["measured"] for row in rows if row["rate"] == rate}
    hosts = [n for system, n in measured if system == name and ("Horovod", n) in measured]
    axes.scatter(hosts, [measured["Horovod", n] / measured[name, n] for n in hosts], s=9, color=colour, zorder=3)
