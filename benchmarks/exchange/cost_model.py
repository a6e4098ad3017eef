"""Compares the cost model (grace_ext/planning/cost.py) with the times of exchange.py on 2 and 4 hosts; extrapolates to 1,024 workers.

    python benchmarks/exchange/cost_model.py [--results FILE] [--out FILE] [--pictures FOLDER]

Nothing is fitted to the exchanges that are predicted. A link's latency, overhead and rate are fitted to plain collectives of a few sizes
that exchange.py times in each cell; the times of encoding and decoding are measured here, on simulated ranks in this process.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

import grace_ext
from grace_ext.parts.tensor import TensorSpec
from grace_ext.planning.cost import Link, Work, allreduce, crossing, exchange
from grace_ext.planning.probe import fitted

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import plots, record, shapes
from benchmarks.exchange.exchange import RATES, RESULTS, ROOT, dense_ms
from benchmarks.exchange.systems import specs

COST, PICTURES = RESULTS.with_name("cost.json"), ROOT / "docs" / "pictures"
WORKERS = tuple(2**i for i in range(1, 11))
console = Console(width=150, highlight=False)


def link_of(cells: list[dict[str, Any]]) -> Link:
    """Fits the link of one rate to the plain collectives of its cells."""
    return fitted([tuple(point) for cell in cells for point in cell["links"]])


def work_of(spec: str, model: shapes.Shapes, threshold: float | None, sizes: tuple[int, ...] = (1, 3), steps: int = 3) -> Work:
    """Measures encode and decode of one rank by stepping 1 and 3 simulated ranks: one of n ranks takes encode + n decode if it receives n
    payloads. Takes the fastest step after the first; a threshold's residual is set to that of long training (shapes.steady_residual)."""
    ranks, seconds = np.array(sizes), np.array([min(stepped(spec, model, threshold, n, steps)) for n in sizes])
    decode, encode = np.polyfit(ranks, seconds, 1)
    if decode < 0:  # the part that does not grow with the number of payloads is encoding
        return Work(float(seconds.mean()), 0.0)
    return Work(float(encode), float(decode)) if encode > 0 else Work(0.0, float(ranks @ seconds / (ranks @ ranks)))


def stepped(spec: str, model: shapes.Shapes, threshold: float | None, n: int, steps: int) -> list[float]:
    """Returns the seconds per rank of n simulated ranks, for each step after the first."""
    cluster, scales, seconds = grace_ext.LocalCluster(grace_ext.grace(spec), n, framework="torch"), shapes.scales(model), []
    for step in range(steps + 1):
        generator = torch.Generator().manual_seed(step)
        ranks = [{k: torch.empty(dims).normal_(0, scales[k], generator=generator) for k, dims in model.items()} for _ in range(n)]
        start = time.perf_counter()
        cluster.step(ranks)
        seconds.append((time.perf_counter() - start) / n)
        if step == 0 and threshold:
            saved = cluster.state_dict()
            for rank in saved["ranks"]:
                drawn = np.random.default_rng(rank["rank"])
                held = {f"residual/{k}": shapes.steady_residual(threshold, dims, drawn).reshape(-1) for k, dims in model.items()}
                rank["state"].update(held)
            cluster.load_state_dict(saved)
    return seconds[1:]


def copy_seconds(count: int, repeats: int = 7) -> float:
    """Returns the median seconds to copy a float32 array of `count` elements in memory."""
    source, target, seconds = torch.ones(count), torch.empty(count), []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Model:
    """Predicts the time of an exchange of one model's gradients, by system, number of workers and link."""

    def __init__(self, name: str):
        self.name, self.shapes = name, shapes.MODELS[name]()
        self.dense = 4 * shapes.elements(self.shapes)
        self.threshold = shapes.threshold_for(self.shapes)
        self.specs = specs(self.threshold)
        #: Dense Horovod makes three passes: it copies gradients into a buffer, adds, and copies them out of it.
        self.plain_work = Work(3 * copy_seconds(self.dense // 4), 0.0)
        self.work: dict[str, Work] = {}
        self.payload: dict[str, int] = {}

    def measure(self, system: str, sent: int | None) -> None:
        """Measures the system's encoding and decoding. sent: measured bytes of a payload, used if its size depends on the data."""
        g = grace_ext.grace(self.specs[system])
        self.work[system] = work_of(self.specs[system], self.shapes, self.threshold if system == "threshold" else None)
        bound = sum(g.compressor.nbytes(TensorSpec(name, dims)) for name, dims in self.shapes.items())
        self.payload[system] = sent if sent is not None and g.communicator.name == "allgather" else bound

    def seconds(self, system: str, link: Link, n: int, shared: float = 1.0) -> float:
        """Predicts the seconds of an exchange. shared: how many ranks share a core, which multiplies the work's time."""
        communicator = grace_ext.grace(self.specs[system]).communicator
        work = Work(self.work[system].encode * shared, self.work[system].decode * shared)
        return exchange(communicator, link, n, self.payload[system], self.dense, work)

    def plain(self, link: Link, n: int, shared: float = 1.0) -> float:
        return self.plain_work.encode * shared + allreduce(link, n, self.dense)


def compared(model: Model, cells: list[dict[str, Any]], links: dict[str, Link], cores: int) -> list[dict[str, Any]]:
    """Returns predicted and measured times, one row per cell and system."""
    rows = []
    for cell in cells:
        link, n = links[cell["rate"]], cell["hosts"]
        at = {"rate": cell["rate"], "hosts": n}
        shared = max(1, n / cores)  # netlab's hosts share one machine's cores
        if dense_ms(cell):
            rows.append({**at, "system": "Horovod", "predicted": 1000 * model.plain(link, n, shared), "measured": dense_ms(cell)})
        for name in model.work:
            seen = cell["systems"].get(name, {})
            if seen.get("outcome") == "completes":
                predicted = 1000 * model.seconds(name, link, n, shared)
                rows.append({**at, "system": name, "predicted": predicted, "measured": seen["ms"]})
    return rows


def extrapolated(model: Model, links: dict[str, Link]) -> dict[str, Any]:
    """Returns by rate the milliseconds per number of workers, and the number of workers from which dense Horovod is as fast."""
    table: dict[str, Any] = {}
    for rate, measured in links.items():
        link = Link(RATES[rate], measured.latency, measured.overhead)
        systems: dict[str, Callable[[int], float]] = {"Horovod": lambda n, link=link: model.plain(link, n)}
        systems |= {name: lambda n, name=name, link=link: model.seconds(name, link, n) for name in model.work}
        table[rate] = {
            "ms": {name: {n: round(1000 * of(n), 3) for n in WORKERS} for name, of in systems.items()},
            "slower_from": {name: crossing(of, systems["Horovod"]) for name, of in systems.items() if name != "Horovod"},
        }
    return table


def main(
    model: Annotated[str, typer.Option(help="the model whose cells are compared")] = "resnet50",
    results: Annotated[Path, typer.Option(help="the file that exchange.py wrote")] = RESULTS,
    out: Annotated[Path, typer.Option(help="file for the results")] = COST,
    pictures: Annotated[Path, typer.Option(help="folder for the picture")] = PICTURES,
) -> None:
    torch.set_num_threads(1)
    cells = json.loads(results.read_text())["cells"].values()
    every = [c for c in cells if c["model"] == model and c["rate"] in RATES and c["links"]]
    if not every:
        raise typer.BadParameter(f"{results} has no whole cell of {model}; run exchange.py --model {model} first")
    links = {rate: link_of([c for c in every if c["rate"] == rate]) for rate in RATES if any(c["rate"] == rate for c in every)}
    chosen, here = Model(model), record.stamp()
    ran = [name for name in chosen.specs if any(c["systems"].get(name, {}).get("outcome") == "completes" for c in every)]
    for name in ran:
        with console.status(f"encoding and decoding: {name}"):
            chosen.measure(name, next((c["systems"][name].get("wire_bytes") for c in every if name in c["systems"]), None))
        work = chosen.work[name]
        sizes = f"{chosen.payload[name]:12,} bytes"
        console.print(f"{name:12} encode {1000 * work.encode:8.1f} ms  decode {1000 * work.decode:8.1f} ms  {sizes}")
    cores = record.cores()
    summary = {
        **here, "model": model, "cores": cores, "dense_bytes": chosen.dense, "specs": chosen.specs,
        "links": {r: {"rate": x.rate, "latency": x.latency, "overhead": x.overhead} for r, x in links.items()},
        "work": {name: {"encode": w.encode, "decode": w.decode, "payload": chosen.payload[name]} for name, w in chosen.work.items()},
        "plain_work": chosen.plain_work.encode, "compared": compared(chosen, every, links, cores),
        "extrapolated": extrapolated(chosen, links),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summary, indent=1) + "\n")
    plots.draw_cost(summary, pictures)
    off = [abs(row["predicted"] / row["measured"] - 1) for row in summary["compared"]]
    console.print(f"{len(off)} exchanges predicted, median error {100 * statistics.median(off):.0f}%")


if __name__ == "__main__":
    typer.run(main)
