#!/usr/bin/env python3
"""Times reduce_scatter and sparse_allreduce on many tensors with small tensors whole, as they are, and cut among all ranks, side by side.

    python benchmarks/exchange/shards.py [--tensors 20] [--elements 1000] [--ranks 2 8 32] [--times 5]

Prints milliseconds per rank and step of a LocalCluster, without a network, as medians of steps that are made in turn, and their ratio.
Takes under a minute; no torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
import grace_ext
from grace_ext.communicators import shards

SPECS = (
    "efsignsgd + residual @ reduce_scatter",
    "qsgd(bits=4) + none @ reduce_scatter",
    "topk(ratio=0.1) + residual @ reduce_scatter",
    "topk(ratio=0.1) + residual @ sparse_allreduce",
)
WHOLE, CUT = shards.FEWEST, 1


def stepped(cluster: grace_ext.LocalCluster, given: list[dict[str, np.ndarray]], fewest: int) -> float:
    """Returns the seconds of one rank in a step with shards of at least so many elements."""
    shards.FEWEST = fewest
    shards.shards.cache_clear()
    begin = time.perf_counter()
    cluster.step(given)
    return (time.perf_counter() - begin) / cluster.size


def measured(spec: str, given: list[dict[str, np.ndarray]], times: int) -> tuple[float, float]:
    """Returns the median milliseconds with small tensors whole, and with every tensor cut among all ranks."""
    g = grace_ext.grace(spec)
    clusters = {fewest: grace_ext.LocalCluster(g, len(given)) for fewest in (WHOLE, CUT)}
    seconds = {fewest: [stepped(cluster, given, fewest) for _ in range(2)] for fewest, cluster in clusters.items()}
    for _ in range(times):
        for fewest, cluster in clusters.items():
            seconds[fewest].append(stepped(cluster, given, fewest))
    return 1000 * statistics.median(seconds[WHOLE][2:]), 1000 * statistics.median(seconds[CUT][2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=20)
    parser.add_argument("--elements", type=int, default=1000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{options.tensors} tensors of {options.elements:,} elements; ms per rank and step")
    print(f"{'spec':46} {'ranks':>5} {'whole':>8} {'cut':>8} {'ratio':>6}")
    for spec in SPECS:
        for n in options.ranks:
            given = [{f"p{i}": rng.standard_normal(options.elements, np.float32) for i in range(options.tensors)} for _ in range(n)]
            whole, cut = measured(spec, given, options.times)
            print(f"{spec:46} {n:5} {whole:8.2f} {cut:8.2f} {cut / whole:6.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
