"""Measures what metrics cost: steps with and without them alternate in one process.

    python benchmarks/reliability/metrics.py            writes benchmarks/results/reliability/metrics.json

A single rank compresses what a rank of a job would, but waits for no network: real steps take longer, so metrics are a smaller share of
them. Every second step has metrics; ratios are of neighbouring steps, so that other load of the machine affects both. A close look (one
step in `every`) is timed separately.
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
    """Returns a training step of four encoder layers, and the driver."""
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

    return step, optimizer._exchange.session.driver


def resnet50(spec: str) -> tuple[Callable[[], None], Any]:
    """Returns the exchange of ResNet-50's gradients, without any other computation, and the driver."""
    cluster = grace_ext.LocalCluster(grace_ext.grace(spec), 1)
    generator = np.random.default_rng(0)
    gradients = {name: generator.standard_normal(dims).astype(np.float32) for name, dims in shapes.resnet50().items()}
    return lambda: cluster.step([gradients]) and None, cluster.drivers[0]


CASES = {"transformer, a training step": transformer, "ResNet-50's gradients, the exchange alone": resnet50}


def measure(make: Callable[[str], tuple[Callable[[], None], Any]], spec: str, pairs: int, looks: int) -> dict[str, float]:
    """Returns medians: plain, the seconds of a step without metrics; ratio, with to without; look, the seconds that a close look adds."""
    step, driver = make(spec)
    step()
    Metrics(10**9).attach(driver, network=False)  # only its first step has a close look
    recorder = driver.observer
    for _ in range(3):
        step()
    plain, ratios, extra = [], [], []
    for i in range(2 * pairs):  # on, off, off, on: drift affects both
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
    parser.add_argument("--pairs", type=int, default=150, help="half the number of steps with, and of steps without metrics")
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
        "text": "Steps with and without metrics alternate in one process; the table has medians of the ratios of neighbouring steps. A "
        f"close look measures errors and norms, by default once in {EVERY} steps. The last column is the sum of both, and should be below "
        "2%. Nothing waits for a network here; waiting would make steps longer and the share of metrics smaller.",
        "columns": [
            "what", "parts", "ms per step without metrics", "added to every step", "ms per close look", f"one look in {EVERY} steps adds",
            "together",
        ],
        "rows": rows, "commands": ["python benchmarks/reliability/metrics.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
