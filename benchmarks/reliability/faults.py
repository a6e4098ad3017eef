"""Causes faults in jobs on two netlab hosts (needs root): kills a rank in the middle of a collective, cuts and restores its link, stops and
continues its process; and fills the disk during a checkpoint. Writes benchmarks/results/reliability/faults.json.

    python benchmarks/reliability/faults.py            # stops a process, and cuts a link, for 60 s
    python benchmarks/reliability/faults.py --short    # for 20 s; prints the rows and writes nothing
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

ROOT = Path(__file__).parents[2]
TEXT = (
    "Two hosts with links of 100 Mbit/s exchange 4 MB of dense gradients per step. In the middle of a collective, rank 1 is killed "
    "(SIGKILL), its host's link is cut and restored, or it is stopped (SIGSTOP) and continued, for longer and for shorter than "
    "GRACE_EXT_TIMEOUT. 'after' is the time from the fault to the error on rank 0, or to the end of the job. A rank that its launcher "
    "ends first says nothing. The disk is a tmpfs that is too small for the second checkpoint."
)


def outcome(seen: dict[str, Any]) -> list[str]:
    """Returns three cells of a row: what the ranks said, the seconds, and the exit codes of the launchers."""
    said = []
    for rank, error in enumerate(seen["errors"]):
        ended = "ended" if rank in seen["ended"] else "said nothing"
        said.append(f"rank {rank}: {error.split(':')[0] if error else ended}")
    if seen["left"]:
        said.append(f"still there a minute later: rank {', '.join(map(str, seen['left']))}")
    if len(seen["weights"]) == 1 and len(seen["ended"]) == 2:
        said.append("the same weights")
    return ["; ".join(said), f"{seen['seconds']} s", ", ".join(map(str, seen["exits"]))]


def network(rows: list[list[str]], short: bool) -> None:
    from benchmarks.netlab.netlab import Netlab
    from tests.frameworks.support.faults import ENGINES, strike

    long, tight, loose = (20, 8, 60) if short else (60, 20, 120)
    cases = [("killed", tight, 0, 1000)]
    for fault in ("cut", "stopped"):
        cases += [(fault, tight, long, 1000), (fault, loose, long, 30)]
    with Netlab(2, rate="100mbit") as lab:
        for engine in ENGINES:
            for fault, timeout, lasts, steps in cases:
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        seen = outcome(strike(lab, engine, fault, Path(folder), timeout=timeout, lasts=lasts, steps=steps))
                    except AssertionError as error:
                        seen = [f"did not begin: {str(error)[-80:]}", "", ""]
                what = fault if fault == "killed" else f"{fault} for {lasts} s"
                rows.append([engine, what, f"{timeout} s", *seen])
                print(*rows[-1], sep="; ", flush=True)


def disk(rows: list[list[str]]) -> None:
    from tests.frameworks.support.full_disk import save_on_a_full_disk

    seen = save_on_a_full_disk()
    rows.append(["LocalCluster", "disk full at a checkpoint", "", f"{seen['error']}; loaded then: {seen['loaded']}", "", ""])
    print(*rows[-1], sep="; ", flush=True)


def main() -> None:
    rows: list[list[str]] = []
    short = "--short" in sys.argv
    disk(rows)
    network(rows, short)
    if short:
        return
    record.reliability("faults", {
        "title": "Faults", "text": TEXT,
        "columns": ["launcher", "fault of rank 1", "GRACE_EXT_TIMEOUT", "what the ranks did", "after", "exit codes of the launchers"],
        "rows": rows, "commands": ["python benchmarks/reliability/faults.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
