"""Writes tests/arrays/device_budgets.json, and its table in docs/gpu.md: what one step costs on a device per rank and spec, counted on a
pretended one.

    python tools/device_budgets.py            lowers the numbers that have fallen, and adds specs that are new
    python tools/device_budgets.py --again    writes what is measured, also where it is more
    python tools/device_budgets.py --show     prints the table

tests/arrays/test_device_budgets.py holds the numbers: none may rise. launches: operations that run a kernel. waits: how often the host
waits for the device. uploads, downloads: copies. bytes: read and written by kernels, per element. Two ranks; what the engine computes
inside of a collective does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from grace_ext import LocalCluster, grace
from grace_ext.arrays import libraries
from grace_ext.exchange import lockstep
from grace_ext.testing.pretended_device import COUNTS, DeviceTensor, PretendedOps

FILE = Path(__file__).parents[1] / "tests" / "arrays" / "device_budgets.json"
RANKS = 2
SPECS = (
    "none + none", "topk(ratio=0.01) + residual", "threshold(threshold=2.5) + residual", "randomk(ratio=0.01) + residual(beta=0.9)",
    "signsgd + none", "efsignsgd + residual", "efsignsgd(block=1024) + residual", "onebit + residual", "qsgd(bits=4) + none",
    "qsgd(bits=8) + none", "terngrad + none", "natural + none", "powersgd(rank=2) + residual", "dgc(ratio=0.01) + dgc",
    "sidco(ratio=0.01) + residual", "fp16 + none", "bf16 + none", "sketch + residual",
)  # fmt: skip
#: By name: the shapes of the tensors of one bucket.
BUCKETS: dict[str, tuple[tuple[int, ...], ...]] = {"one tensor": ((1024, 1024),), "20 tensors": ((40, 40),) * 20}


def measure(spec: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Returns what the second step of these tensors costs, per rank."""
    torch.set_num_threads(1)
    ops, generator = PretendedOps(), torch.Generator().manual_seed(0)
    with mock.patch.object(libraries, "ops_for_framework", lambda framework: ops):
        cluster = LocalCluster(grace(spec), RANKS, "torch")
    for driver in cluster.drivers:
        driver._in_place = True  # as all wrappers do
    for _ in range(2):
        gradients = [{f"w{i}": DeviceTensor(torch.randn(s, generator=generator)) for i, s in enumerate(shapes)} for _ in range(RANKS)]
        COUNTS.clear()
        with _without_the_engine():
            cluster.step(gradients, lr=0.125)
    elements = RANKS * sum(torch.Size(shape).numel() for shape in shapes)
    counts = {name: getattr(COUNTS, name) / RANKS for name in ("launches", "waits", "uploads", "downloads")}
    return {**counts, "bytes": round((COUNTS.read + COUNTS.written) / elements, 1)}


@contextmanager
def _without_the_engine() -> Iterator[None]:
    original: Callable[..., Any] = lockstep.execute

    def execute(*arguments: Any) -> Any:
        before = dict(vars(COUNTS), by_name=COUNTS.by_name.copy())
        try:
            return original(*arguments)
        finally:
            vars(COUNTS).update(before)

    with mock.patch.object(lockstep, "execute", execute):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="write what is measured, also where it is more")
    parser.add_argument("--show", action="store_true", help="print the table")
    options = parser.parse_args()
    budgets = json.loads(FILE.read_text()) if FILE.exists() else {}
    if options.show:
        for spec, buckets in budgets.items():
            for name, costs in buckets.items():
                print(f"{spec:42} {name:10}", "  ".join(f"{key} {value:g}" for key, value in costs.items()))
        return
    written: dict[str, Any] = {}
    for spec in SPECS:
        for name, shapes in BUCKETS.items():
            costs, before = measure(spec, shapes), {} if options.again else budgets.get(spec, {}).get(name, {})
            written.setdefault(spec, {})[name] = {key: min(value, before.get(key, value)) for key, value in costs.items()}
    lines = [
        f"  {json.dumps(s)}: {{\n" + ",\n".join(f"    {json.dumps(n)}: {json.dumps(c)}" for n, c in b.items()) + "\n  }"
        for s, b in written.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    subprocess.run([sys.executable, Path(__file__).with_name("gpu_page.py")], check=True)


if __name__ == "__main__":
    main()
