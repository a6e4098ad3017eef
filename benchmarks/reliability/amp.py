"""Tests mixed precision in real jobs of 2 ranks. Writes benchmarks/results/reliability/amp.json.

    python benchmarks/reliability/amp.py              # all jobs
    python benchmarks/reliability/amp.py torchrun     # jobs whose 'launcher file' contains this; other rows stay as they are
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

TEXT = (
    "The jobs of 2 ranks use torch's GradScaler (under torchrun with the wrapper and the DDP hook, under horovodrun with the wrapper), "
    "16-bit autocast, and Keras's LossScaleOptimizer. While the scale grows by powers of two, weights and memory must have the same bits "
    "as in training without a scale. After an Inf on one rank, no rank's weights or memory may change, and all ranks must halve the scale. "
    "Memories of one array and of several arrays are tested."
)
JOBS = (("torchrun", "amp_job.py"), ("horovodrun", "amp_job.py"), ("horovodrun", "amp_tf_job.py"))


def of_job(engine: str, file: str) -> list[list[str]]:
    """Runs a job. Returns one row per case."""
    from tests.frameworks.support.launch import JOBS as FOLDER
    from tests.frameworks.support.launch import job

    return rows(engine, file, (FOLDER / file).read_text(), job(engine, 2, file, timeout=1200))


def rows(engine: str, file: str, source: str, said: str) -> list[list[str]]:
    """Returns one row per case of the job's source, from the output `said`."""
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
