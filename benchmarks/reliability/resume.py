"""Tests that resuming is exact: 10 steps give the same bits as 5 steps, save, a new process, load, 5 steps. Writes
benchmarks/results/reliability/resume.json.

    python benchmarks/reliability/resume.py            # every compressor with every memory, and the jobs of all frameworks
    python benchmarks/reliability/resume.py mpirun     # only the rows whose first column contains this; other rows stay as they are
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

ROOT = Path(__file__).parents[2]
MATRIX = "LocalCluster, every mix"
TEXT = (
    "Training of 10 steps is compared with 5 steps, grace_ext.save, new processes, grace_ext.load and 5 steps: the last result and all "
    "ranks' memory must have the same bits. The first row tests every compressor (with the knobs of the test catalogue) with every memory "
    "that takes it, and all other communicators, in a LocalCluster of 2 ranks that one process saves and another resumes. The other rows "
    "are real jobs of 2 processes, or of 2 and 3 if the number of ranks changes; then the ranks' mean of what was unsent must stay the "
    "same to float32 rounding, and training must continue."
)


def matrix() -> list[str]:
    """Returns the row of the LocalCluster."""
    from tests.checkpoints import resume_matrix

    specs, refused = resume_matrix.every()
    with tempfile.TemporaryDirectory() as folder:
        found = resume_matrix.compare(specs, Path(folder))
    counts = Counter("equal" if outcome == "equal" else "different" for outcome in found.values())
    for spec, outcome in found.items():
        if outcome != "equal":
            print(f"{spec}: {outcome}", file=sys.stderr)
    return [MATRIX, f"{counts['equal']} equal, {counts['different']} not", f"{refused} pairs refused when composed"]


def of_job(case: Any) -> list[str]:
    """Returns the row of a framework's job."""
    from tests.frameworks.support import resume_cases

    with tempfile.TemporaryDirectory() as folder:
        outcomes = resume_cases.outcomes(case, Path(folder))
    good = sum(outcome == "equal" for outcome in outcomes.values())
    return [case.title, f"{good} equal, {len(outcomes) - good} not", ", ".join(outcomes)]


def main(only: str = "") -> None:
    from tests.frameworks.support import resume_cases

    wanted = {MATRIX: matrix, **{case.title: partial(of_job, case) for case in resume_cases.CASES}}
    rows = {row[0]: row for row in record.reliability_rows("resume")}
    for title, run in wanted.items():
        if only in title:
            rows[title] = run()
            print(rows[title], flush=True)
            write([rows[title] for title in wanted if title in rows])


def write(rows: list[list[str]]) -> None:
    record.reliability("resume", {
        "title": "Resume matrix",
        "text": TEXT,
        "columns": ["case", "outcome", "details"],
        "rows": rows,
        "commands": ["python benchmarks/reliability/resume.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
