"""Tests what ranks may do differently and that they find out what they may not: runs cases of tests/frameworks/jobs on real processes and
writes benchmarks/results/reliability/agreement.json.

    python benchmarks/reliability/agreement.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

ROOT = Path(__file__).parents[2]
TEXT = (
    "Each case is a function of a job that runs on 2 to 4 real processes. It holds if its assertions hold on every rank: the ranks end "
    "with the same bits, or all of them get an error that names the rank and the difference. Every case of the wrapper is tried with "
    "sparse, low-rank, random-block and sign compressors, if that makes a difference."
)
JOBS = (
    ("torchrun", 3, "agreement_job.py", ()),
    ("horovodrun", 2, "agreement_job.py", ()),
    ("horovodrun", 2, "tf_job.py", ("case_agreement", "case_disagreement")),
    ("torchrun", 2, "ddp_use_job.py", ("case_agreement_between_steps", "case_disagreement", "case_ranks_with_different_bucket_sizes")),
    ("mpirun", 4, "mpi_use_job.py", ()),
)


def held(engine: str, ranks: int, file: str, cases: tuple[str, ...]) -> dict[str, bool]:
    """Runs one job. Returns by case whether it held on all ranks."""
    from tests.frameworks.support.launch import JOBS as FOLDER
    from tests.frameworks.support.launch import environment, launcher

    told = () if engine == "mpirun" else cases  # that job would take the names of cases for specs
    done = subprocess.run(
        [*launcher(engine, ranks), str(FOLDER / file), *told], env=environment(), capture_output=True, text=True, timeout=600
    )
    ok = set(re.findall(r"CASE (case_\w+) ok", done.stdout))
    every = cases or re.findall(r"^def (case_\w+)", (FOLDER / file).read_text(), re.MULTILINE)
    if file == "mpi_use_job.py":
        every = [case for case in every if "agreement" in case]
    return {case: case in ok for case in every}


def main() -> None:
    rows = []
    for engine, ranks, file, cases in JOBS:
        for case, good in held(engine, ranks, file, cases).items():
            words = case.removeprefix("case_").replace("_", " ")
            rows.append([words, f"{engine}, {ranks} ranks", file.removesuffix("_job.py"), "held" if good else "did not hold"])
            print(*rows[-1], sep="; ", flush=True)
    record.reliability("agreement", {
        "title": "Agreement", "text": TEXT,
        "columns": ["case", "launcher", "job", "outcome"], "rows": rows, "commands": ["python benchmarks/reliability/agreement.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
