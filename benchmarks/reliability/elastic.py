"""Runs elastic jobs on this machine: one of three workers is killed, two continue, one joins; and torchrun restarts a job from a
checkpoint. Writes benchmarks/results/reliability/elastic.json.

    python benchmarks/reliability/elastic.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

ROOT = Path(__file__).parents[2]
TEXT = (
    "Three workers train under `horovodrun --min-np 2 --max-np 3` with a host discovery script. One is killed with SIGKILL; the other two "
    "return to the last commit and continue; then the script names another host, and a third worker joins. The loss column has the mean "
    "loss of all ranks in the first and in the last 12 steps. With torchrun, rank 1 kills itself in step 7 of 12; all ranks are started "
    "again and continue from the checkpoint of step 4. Their weights are compared, bit for bit, with those of a run without a death."
)
SPECS = ("topk(ratio=0.1) + residual", "powersgd(rank=2) + residual", "efsignsgd + residual @ reduce_scatter")


def horovods(file: str, spec: str) -> list[str]:
    from tests.frameworks.support.elastic import kill_and_grow
    from tests.frameworks.support.launch import launcher

    with tempfile.TemporaryDirectory() as folder:
        seen = kill_and_grow(launcher("horovodrun", 3)[0], Path(folder), file, spec, limit=600)
    same = len(seen["weights"]) == 3 and len(set(seen["weights"].values())) == 1
    by = "Keras" if "tf" in file else "torch"
    sizes = ", ".join(map(str, seen["sizes"]))
    losses = f"{seen['loss_first']:.3f} to {seen['loss_last']:.3f}"
    return [f"horovodrun, {by}", spec, sizes, losses, "the same on all ranks" if same else "not the same", f"exit {seen['exit']}"]


def torchruns(spec: str) -> list[str]:
    from tests.frameworks.support.launch import JOBS, environment, launcher

    said = []
    for dies in ((), ("die",)):
        with tempfile.TemporaryDirectory() as folder:
            command = [*launcher("torchrun --max-restarts 1", 3), str(JOBS / "restart_job.py"), folder, spec, *dies]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
        said.append((*(re.findall(r"WEIGHTS (\w+) (\d)", done.stdout) or [("none", "none")])[-1], done.returncode))
    (straight, _, _), (again, restarts, code) = said
    same = "those of the run without a death" if straight == again != "none" else "not those of the run without a death"
    return ["torchrun --max-restarts 1", spec, "3, 3", f"{restarts} restart", same, f"exit {code}"]


def main() -> None:
    rows = [torchruns(spec) for spec in SPECS]
    rows += [horovods(file, spec) for file, specs in (("elastic_job.py", SPECS), ("elastic_tf_job.py", SPECS[:1])) for spec in specs]
    record.reliability("elastic", {
        "title": "Elastic jobs", "text": TEXT,
        "columns": ["launcher", "parts", "ranks", "loss", "weights at the end", "outcome"], "rows": rows,
        "commands": ["python benchmarks/reliability/elastic.py"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
