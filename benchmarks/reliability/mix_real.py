"""Runs random mixes of parts on real engines, for mix_fuzz.py --real: one job of two ranks runs many cases (mix_rank.py)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import record

#: By engine: its launcher, and what takes the gradients, in words.
ENGINES = {
    "torchrun": ("torchrun", "DistributedOptimizer over torch.distributed"),
    "horovodrun": ("horovodrun", "DistributedOptimizer over Horovod"),
    "tensorflow": ("horovodrun", "DistributedGradientTape in a tf.function"),
    "mpirun": ("mpirun", "Exchange of numpy arrays"),
    "ddp": ("torchrun", "DistributedDataParallel with ddp_comm_hook"),
    "local_sgd": ("torchrun", "LocalSGD"),
    "bind": ("horovodrun", "unmodified Horovod with bind"),
}
#: Seconds in which a job of many cases must go on, and how often a job that stopped is started again.
SECONDS, AGAIN = 120, 20


def run(engine: str, seeds: range) -> dict[int, str]:
    """Returns what became of each seed: 'held', 'refused', or what is wrong. A case that stops the job counts, and the rest goes on."""
    from tests.frameworks.support.launch import environment, launcher

    told: dict[int, str] = {}
    job = Path(__file__).with_name("mix_rank.py")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(AGAIN):
            out, log = Path(folder, "out"), Path(folder, "log")
            first = seeds.start + len(told)
            out.write_text("")
            with log.open("w") as said:
                command = [*launcher(ENGINES[engine][0], 2), str(job), engine, str(first), str(seeds.stop), str(out)]
                process = subprocess.Popen(command, env={**environment(), "GRACE_EXT_TIMEOUT": "30"}, stdout=said, stderr=said)
                _watched(process, out, len(told), len(seeds))
            for line in out.read_text().splitlines():
                seed, verdict = line.split(" ", 1)
                told[int(seed)] = verdict
            if len(told) == len(seeds):
                break
            told[seeds.start + len(told)] = "the job ended: " + " ".join(log.read_text()[-2000:].split())
    return told


def _watched(process: subprocess.Popen[bytes], out: Path, before: int, count: int) -> None:
    """Waits for a job, with a bar; ends one that makes no progress for SECONDS."""
    seen, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        done = out.read_text().count("\n")
        if done > seen:
            seen, since = done, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        if sys.stderr.isatty():
            share = (before + done) / count
            print(f"\r  [{'#' * int(40 * share):<40}] {before + done:,} of {count:,}", end="", file=sys.stderr, flush=True)


def main(engines: list[str], seeds: range, write: bool) -> int:
    """Runs the cases on each engine, prints what does not hold, and writes the table. Returns the exit status."""
    failed, rows = False, {row[0]: row for row in record.reliability_rows("mixes_real")} if write else {}
    for engine in engines:
        print(f"{engine}: seeds {seeds.start} to {seeds.stop - 1}", file=sys.stderr)
        begun = time.monotonic()
        told = run(engine, seeds)
        counts = Counter("failed" if text not in ("held", "refused") else text for text in told.values())
        for seed, text in told.items():
            if text not in ("held", "refused"):
                print(f"{engine}, seed {seed}: {text}", flush=True)
        failed |= counts["failed"] > 0
        seconds = round(time.monotonic() - begun)
        print(f"\n{engine}: {dict(counts)} in {seconds} s", flush=True)
        numbers = [f"{seeds.start} to {seeds.stop - 1}", counts["held"], counts["refused"], counts["failed"], seconds]
        rows[engine] = [engine, ENGINES[engine][1], *numbers]
        if write:
            written([rows[engine] for engine in ENGINES if engine in rows])
    return int(failed)


def written(rows: list[list[Any]]) -> None:
    record.reliability("mixes_real", {
        "title": "Random mixes of parts on real engines",
        "text": "Two ranks run the cases of these seeds in one job, with random specs, tensors and gradients, 2 or 3 steps each; results "
        "(for LocalSGD: models) of each step are compared with those of a LocalCluster. 'held' are equal bit for bit on both ranks. "
        "'refused' are specs that the engine or wrapper refuses, alike on both ranks and before anything is exchanged (for example, a "
        "tape has no learning rate, and LocalSGD takes no momentum of the gradients), and those whose results depend on times (policy "
        "auto).",
        "columns": ["engine", "what takes the gradients", "seeds", "held", "refused", "failed", "seconds"],
        "rows": rows, "commands": ["python benchmarks/reliability/mix_fuzz.py --real"],
    })  # fmt: skip
