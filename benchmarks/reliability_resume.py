"""The resume matrix: train 10 steps = train 5, save, end the process, load in a new one, train 5, bit for bit. Writes
benchmarks/results/reliability/resume.json.

    python benchmarks/reliability_resume.py            # all of it: every compressor with every memory, and the jobs of all frameworks
    python benchmarks/reliability_resume.py --jobs     # the jobs alone; the rows of the rest stay as they are
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULT = Path(__file__).parent / "results" / "reliability" / "resume.json"
TEXT = (
    "Training of 10 steps is compared with 5 steps, grace_ext.save, new processes, grace_ext.load and 5 steps: the last result and all "
    "ranks' memory must be the same bits. The first row walks every compressor (with the knobs of the test catalogue) and every memory "
    "that takes it, and all other communicators, in a LocalCluster of 2 ranks, saved by one process and resumed by another; the others "
    "are real jobs of 2 processes, and of 2 and 3 where the number of ranks changes: there the mean over the ranks of what was unsent must "
    "stay the same to float32 rounding, and training must go on."
)


def matrix() -> list[str]:
    """The row of the LocalCluster."""
    from tests import resume_matrix

    specs, refused = resume_matrix.every()
    with tempfile.TemporaryDirectory() as folder:
        found = resume_matrix.compare(specs, Path(folder))
    counts = Counter("equal" if outcome == "equal" else "different" for outcome in found.values())
    for spec, outcome in found.items():
        if outcome != "equal":
            print(f"{spec}: {outcome}", file=sys.stderr)
    return ["LocalCluster, every mix", f"{counts['equal']} equal, {counts['different']} not", f"{refused} pairs refused when composed"]


def jobs() -> list[list[str]]:
    """A row for each framework's job."""
    from tests.frameworks import resume_cases

    rows = []
    for case in resume_cases.CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = resume_cases.outcomes(case, Path(folder))
        good = sum(outcome == "equal" for outcome in outcomes.values())
        rows.append([case.title, f"{good} equal, {len(outcomes) - good} not", ", ".join(outcomes)])
    return rows


def main() -> None:
    before = json.loads(RESULT.read_text())["rows"][:1] if "--jobs" in sys.argv else [matrix()]
    document = {
        "title": "Resume matrix",
        "machine": record.machine(),
        "text": TEXT,
        "columns": ["case", "outcome", "of"],
        "rows": before + jobs(),
        "commands": ["python benchmarks/reliability_resume.py"],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["rows"], indent=1))


if __name__ == "__main__":
    main()
