"""Trains many steps on several ranks with many specs. Is memory flat, do the ranks have the same bits, do residuals stay within theory?

    python benchmarks/reliability/soak.py        10,000 steps of 4 ranks by mpirun; writes benchmarks/results/reliability/soak.json
    python benchmarks/reliability/soak.py --steps 300 --json FILE        fewer steps; writes the ranks' results to FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from grace_ext.cli.check import tool

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

RANK = Path(__file__).with_name("soak_rank.py")
MPI = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]


def soak(steps: int, ranks: int, timeout: float) -> list[dict[str, Any]]:
    """Runs the job. Returns the result of every rank. Raises CalledProcessError if the job fails."""
    mpirun = tool("mpirun")
    if mpirun is None:
        raise SystemExit("mpirun is not installed: pip install 'grace_ext[mpi]'")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ranks.json")
        command = ["nice", "-n", "19", mpirun, *MPI, "-np", str(ranks), sys.executable, "-m", "mpi4py", str(RANK), str(steps), str(file)]
        subprocess.run(command, check=True, timeout=timeout)
        return json.loads(file.read_text())


def row(seen: dict[str, Any], digest: str) -> list[Any]:
    return [
        seen["rank"], seen["steps"], f"{seen['first'] / 2**20:.1f}", f"{seen['last'] / 2**20:.1f}", f"{seen['slope']:+.1f}",
        seen["digest"] == digest, f"{seen['worst_ratio']:.3f} ({seen['worst']})", f"{seen['ms']:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=7200)
    parser.add_argument("--json", type=Path, help="write the ranks' results to this file, and no table")
    options = parser.parse_args()
    ranks = soak(options.steps, options.ranks, options.timeout)
    if options.json:
        options.json.write_text(json.dumps(ranks))
        return
    rows = [row(seen, ranks[0]["digest"]) for seen in ranks]
    record.reliability("soak", {
        "title": "Soak",
        "text": f"{options.ranks} MPI processes train for {options.steps:,} steps; each tensor has a different spec: "
        f"{', '.join(ranks[0]['specs'])}. Resident memory is noted after a tenth of the steps (warm) and at the end, with the slope of "
        "the line through the values in between. At the end, all ranks must have the same bits in every weight. The residual column is "
        "the largest norm of a residual relative to the bound of theory, sqrt(4 (1 - delta)) / delta times the largest gradient so far, "
        "at every 50th step, over all tensors whose compressor is a contraction; it must stay below 1.",
        "columns": [
            "rank", "steps", "MiB resident, warm", "at the end", "bytes per step", "same bits as rank 0", "residual / bound", "ms per step",
        ],
        "rows": rows, "commands": [f"python benchmarks/reliability/soak.py --steps {options.steps} --ranks {options.ranks}"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
