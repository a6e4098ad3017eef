"""What metrics cost: steps with and without them by turns, in one process.

    python benchmarks/reliability/metrics.py            writes benchmarks/results/reliability/metrics.json

A rank alone compresses what a job's rank would, and waits for no network: real steps take longer, so metrics cost less of them. Every
second step is measured; ratios are of neighbours, so that what else the machine does falls on both. A close look, one step of `every`,
is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.driver.observer import Observer
from grace_ext.metrics.metrics import Metrics

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record, shapes

EVERY = 100
SPECS = ("topk(ratio=0.01) + residual", "powersgd(rank=4) + residual", "qsgd(bits=4) + none")


def transformer(spec: str) -> tuple[Callable[[], None], Any]:
    """A training step of four encoder layers, and the driver."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), grace_ext.grace(spec), simulate=True
    )
    x = torch.randn(4, 32, 256)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step, optimizer._session.driver


def resnet50(spec: str) -> tuple[Callable[[], None], Any]:
    """The exchange of ResNet-50's gradients alone, with nothing computed, and the driver."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 1)
    generator = np.random.default_rng(0)
    gradients = {name: generator.standard_normal(dims).astype(np.float32) for name, dims in shapes.resnet50().items()}
    return lambda: cluster.step([gradients]) and None, cluster.drivers[0]


CASES = {"transformer, a training step": transformer, "ResNet-50's gradients, the exchange alone": resnet50}


def measure(make: Callable[[str], tuple[Callable[[], None], Any]], spec: str, pairs: int, looks: int) -> dict[str, float]:
    """Seconds of a step without metrics; its ratio to one with; the seconds that a close look adds."""
    step, driver = make(spec)
    step()
    Metrics(10**9).attach(driver, network=False)  # closely at its first step only
    recorder = driver.observer
    for _ in range(3):
        step()
    plain, ratios, extra = [], [], []
    for i in range(2 * pairs):  # off, on, on, off: a drift falls on both
        times = {}
        for on in (i % 2 == 0, i % 2 == 1):
            driver.observer = recorder if on else Observer()
            times[on] = timed(step)
        plain.append(times[False])
        ratios.append(times[True] / times[False])
    for _ in range(looks):
        driver.observer = Observer()
        without = timed(step)
        driver.observer, recorder.measured_at = recorder, -1
        extra.append(timed(step) - without)
    return {"plain": statistics.median(plain), "ratio": statistics.median(ratios), "look": statistics.median(extra)}


def timed(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=150, help="steps with and without metrics: twice so many each")
    parser.add_argument("--looks", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    rows = []
    for case, make in CASES.items():
        for spec in SPECS:
            seen = measure(make, spec, options.pairs, options.looks)
            every_step, look = seen["ratio"] - 1, seen["look"] / EVERY / seen["plain"]
            rows.append([
                case, spec, f"{1e3 * seen['plain']:.1f}", f"{100 * every_step:+.2f}%", f"{1e3 * seen['look']:.1f}",
                f"{100 * look:+.2f}%", f"{100 * (every_step + look):+.2f}%",
            ])  # fmt: skip
            print(*rows[-1], sep=" | ", flush=True)
    record.reliability("metrics", {
        "title": "What metrics cost",
        "text": "Steps with and without metrics by turns, in one process; medians of the ratios of neighbours. A close look measures "
        f"errors and norms; there is one in {EVERY} steps by default. The last column is the sum of both, and should be below 2%. Nothing "
        "waits for a network here, which would make steps longer and the share of metrics smaller.",
        "columns": ["what", "parts", "ms a step without", "every step", "ms of a close look", f"a look in {EVERY} steps", "together"],
        "rows": rows, "commands": ["python benchmarks/reliability/metrics.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
