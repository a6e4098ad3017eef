"""Runs one system of exchange.py as a job: on netlab hosts or on this machine, by horovodrun or torchrun, with a timeout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.exchange.systems import System
from benchmarks.netlab.netlab import Netlab

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_CONTROLLER")
FAILURE = re.compile(r"^.*(?:\w*(?:Error|Exception)\b.*:|enforce fail|preamble|Segmentation|SIG[A-Z]{3,}|not installed).*$", re.MULTILINE)
NOISE = re.compile(r"ChildFailedError|exitcode|SIGTERM|^\s*raise |Process \d+ exit|non-zero exit|shut down|Connection (?:reset|closed)")
GRACE_SECONDS = 10.0  # how long the other processes of a failed job may take to end by themselves


class Hosts:
    """Runs `count` ranks, each on its own netlab host with a link of this rate; with rate 'local', all ranks on this machine."""

    def __init__(self, count: int, rate: str):
        self.count, self.rate = count, rate
        self.lab: Netlab | None = None

    def __enter__(self) -> Hosts:
        if self.rate != "local":
            self.lab = Netlab(self.count, rate=self.rate).up()
        return self

    def __exit__(self, *error: object) -> None:
        if self.lab:
            self.lab.down()

    def clean(self) -> None:
        """Makes the hosts anew after a failed job, so that none of its processes survives."""
        if self.lab:
            self.lab.down()
            self.lab.up()

    def commands(self, program: Sequence[str], by_torchrun: bool) -> list[list[str]]:
        """Returns the command lines to start together."""
        lab, ranks = self.lab, str(self.count)
        if by_torchrun:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
            if lab is None:
                return [[*torchrun, ranks, "--standalone", *program]]
            meet = ["1", "--nnodes", ranks, "--master-addr", lab.addresses["h1"], "--master-port", "29511"]
            lines = [(host, [*torchrun, *meet, "--node-rank", str(rank), *program]) for rank, host in enumerate(lab.addresses)]
            return [lab.command(line, host) for host, line in lines]
        start = [horovodrun(), "--gloo", "-np", ranks]
        if lab is None:
            return [[*start, sys.executable, *program]]
        hosts = ["-H", ",".join(f"{host}:1" for host in lab.addresses), "--network-interfaces", "eth0", "--disable-cache"]
        return [lab.command([*start, *hosts, sys.executable, *program])]


def horovodrun() -> str:
    beside = Path(sys.executable).with_name("horovodrun")
    return str(beside) if beside.exists() else shutil.which("horovodrun") or "horovodrun"


def environment() -> dict[str, str]:
    """Returns the environment of a rank: one thread per rank, this checkout first on the path."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    ours = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    return {**clean, **threads, "PATH": path, "PYTHONPATH": ours, "TF_CPP_MIN_LOG_LEVEL": "3"}


def run(hosts: Hosts, system: System, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Runs the system's job. Returns its `summary`, or {'outcome': 'hangs' or 'fails', 'reason'}."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({**job, **system.job, "group": system.group, "out": name}))
        program = "tf_rank.py" if system.group == "tensorflow" else "rank.py"
        commands = hosts.commands([str(HERE / program), str(folder / "job.json")], system.by_torchrun)
        outcome, said = launched(commands, folder, timeout)
        ranks = [folder / f"rank{rank}.json" for rank in range(hosts.count)]
        if outcome == "completes" and not all(file.exists() for file in ranks):
            outcome = "fails"
        if outcome == "completes":
            return {"outcome": outcome, **summary([json.loads(file.read_text()) for file in ranks])}
    hosts.clean()
    reason = f"not finished after {timeout:.0f} s" if outcome == "hangs" else why(said)
    return {"outcome": outcome, "reason": reason}


def launched(commands: list[list[str]], folder: Path, timeout: float) -> tuple[str, str]:
    """Runs the commands together. Returns 'completes', 'fails' or 'hangs', and the output of the processes."""
    processes, logs = [], []
    try:
        for index, command in enumerate(commands):
            logs.append(folder / f"log{index}")
            with logs[-1].open("w") as log:
                options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True, "cwd": folder}
                processes.append(subprocess.Popen(command, env=environment(), **options))
        outcome = waited(processes, timeout)
    finally:
        for process in processes:
            ended(process)
    return outcome, "\n".join(log.read_text(errors="replace") for log in logs)


def waited(processes: list[subprocess.Popen[bytes]], timeout: float) -> str:
    deadline, failed = time.monotonic() + timeout, False
    while any(process.poll() is None for process in processes):
        if not failed and any(process.poll() for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            return "fails" if failed else "hangs"
        time.sleep(0.1)
    return "fails" if any(process.returncode for process in processes) else "completes"


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group that this process leads, first by SIGTERM: a launcher that is terminated ends its ranks."""
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def why(said: str) -> str:
    """Returns the most informative line of a failed job's output, without folders, times and the prefixes of ranks."""
    lines = [" ".join(line.split()) for line in FAILURE.findall(said) if not NOISE.search(line)]
    line = next((line for line in lines if "preamble" in line or "enforce" in line), (lines or ["it says nothing"])[0])
    line = re.sub(r"\S*/(?=[\w.-]+)", "", line)
    return re.sub(r"^(\[\d+\]<\w+>:|\[?rank\d+\]?:|\w{3} \w{3} +\d+ [\d:]+ \d{4})+ *", "", line)[:200]


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the ranks' reports. ms: the median over the steps of the slowest rank's time; if steps with a hook that does nothing were
    timed, their median is subtracted. sent_bytes: bytes per step that one rank's network interface sent, the largest over the ranks."""
    if "collectives" in ranks[0]:
        return {"collectives": ranks[0]["collectives"]}
    times = slowest([rank["times"] for rank in ranks])
    known = {"ms": statistics.median(times), "steps": len(times), "warmups": ranks[0]["warmups"], "all_ms": [round(t, 2) for t in times]}
    if ranks[0]["baselines"]:
        idle = statistics.median(slowest([rank["baselines"] for rank in ranks]))
        known |= {"with_ddp_ms": known["ms"], "noop_ms": idle, "ms": known["ms"] - idle}
    sent = [[x for x in rank["sent"] if x is not None] for rank in ranks]
    memory = [rank["extra_memory"] for rank in ranks if rank["extra_memory"] is not None]
    known |= {
        "sent_bytes": max(statistics.median(of_rank) for of_rank in sent) if all(sent) else None,
        "wire_bytes": max(rank.get("wire_bytes", 0) for rank in ranks) or None,
        "extra_memory": max(memory) if memory else None,
        "nonzero": ranks[0]["nonzero"],
        "finite": all(rank["finite"] for rank in ranks),
        "ranks_agree": len({rank["digest"] for rank in ranks}) == 1,
    }
    return known | ({"buckets": ranks[0]["buckets"]} if "buckets" in ranks[0] else {})


def slowest(by_rank: list[list[float]]) -> list[float]:
    """Returns the milliseconds of each step on its slowest rank."""
    return [1000 * max(times) for times in zip(*by_rank, strict=True)]
