"""Mixed precision in real jobs of 2 ranks: what held. Writes benchmarks/results/reliability/amp.json.

    python benchmarks/reliability/amp.py              # all jobs
    python benchmarks/reliability/amp.py torchrun     # those with this in 'engine file'; the rows of the others stay as they are
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

TEXT = (
    "Jobs of 2 ranks with torch's GradScaler (by torchrun: the wrapper and the DDP hook; by horovodrun: the wrapper), 16-bit autocast, and "
    "Keras's LossScaleOptimizer. While the scale grows by powers of two, weights and memory must be the bits of training without a "
    "scale; after an Inf on one rank no rank's weights or memory change and all scales are halved alike, for memories of one and of "
    "several arrays."
)
JOBS = (("torchrun", "amp_job.py"), ("horovodrun", "amp_job.py"), ("horovodrun", "amp_tf_job.py"))


def of_job(engine: str, file: str) -> list[list[str]]:
    """A row for each case of this job."""
    from tests.frameworks.support.launch import JOBS as FOLDER
    from tests.frameworks.support.launch import job

    return rows(engine, file, (FOLDER / file).read_text(), job(engine, 2, file, timeout=1200))


def rows(engine: str, file: str, source: str, said: str) -> list[list[str]]:
    """What a job said, by the cases that it has."""
    held = set(re.findall(r"CASE case_(\w+) ok", said))
    test, framework = ("test_keras", "Keras") if "tf" in file else ("test_torch", "torch")
    return [
        [
            f"{engine}, {framework}: {case.replace('_', ' ')}",
            "ok" if case in held else "failed",
            f"pytest tests/frameworks/test_amp.py -k '{test} and {case}'",
        ]
        for case in re.findall(r"^def case_(\w+)", source, re.MULTILINE)
    ]


def main(only: str = "") -> None:
    found = {row[0]: row for row in record.reliability_rows("amp")}
    for engine, file in JOBS:
        if only in f"{engine} {file}":
            found.update({row[0]: row for row in of_job(engine, file)})
            write(list(found.values()))
    print(json.dumps(list(found.values()), indent=1))


def write(found: list[list[str]]) -> None:
    record.reliability("amp", {
        "title": "Mixed precision",
        "text": TEXT,
        "columns": ["case", "outcome", "command"],
        "rows": found,
        "commands": ["python benchmarks/reliability/amp.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
