"""Runs Keras jobs of 2 ranks, of which one is alive and does not come to a collective, or is stopped, and measures when the other's wait
ends. Writes benchmarks/results/reliability/waits.json.

    python benchmarks/reliability/waits.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

TIMEOUT = 10
CASES = {
    "stops early": "stops after epoch 2 of 6 and does something else",
    "has fewer batches": "has 3 batches per epoch, rank 0 has 4",
    "has fewer batches of unknown number": "the same, with SynchronizedStop and datasets of unknown size",
    "averages no metrics": "has no MetricAverageCallback",
    "broadcasts nothing": "starts another collective (it has no broadcast callback)",
    "is stopped": "is stopped (SIGSTOP)",
}
TEXT = (
    "Two ranks train a Keras model, and rank 1 does not come to the collective that rank 0 waits for. 'after' is the time from that moment "
    "to the end of rank 0's training. Horovod's own stall check is off. Where Horovod's error is raised, grace_ext has logged a "
    "CollectiveError that names the collective, if its watchdog ended the wait."
)


def outcome(seen: dict[str, Any]) -> list[str]:
    """Returns three cells of a row: what rank 0 got, the seconds, and the exit code of the launcher."""
    logged = " after a CollectiveError in the log" if "CollectiveError" in seen["logged"] else ""
    raised = "CollectiveError" if seen["error"].startswith("CollectiveError") else "Horovod's error" + logged
    if not seen["error"]:
        raised = "its process was ended by grace_ext" if "This process ends now" in seen["logged"] else "nothing"
    if seen["left"]:
        raised += f"; still there 30 s later: rank {', '.join(map(str, seen['left']))}"
    return [raised, f"{max(0.0, seen['seconds']):.1f} s", str(seen["exit"])]


def main() -> None:
    from tests.frameworks.support.faults import part_ways

    rows = []
    for engine in ("horovodrun --gloo", "horovodrun --mpi"):
        for what, words in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                seen = part_ways(engine.replace(" --gloo", ""), what, Path(folder), timeout=TIMEOUT)
            rows.append([engine, words, f"{TIMEOUT} s", *outcome(seen)])
            print(*rows[-1], sep="; ", flush=True)
    record.reliability("waits", {
        "title": "Ranks that do not come", "text": TEXT,
        "columns": ["launcher", "rank 1", "GRACE_EXT_TIMEOUT", "rank 0 got", "after", "exit code of the launcher"],
        "rows": rows, "commands": ["python benchmarks/reliability/waits.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
