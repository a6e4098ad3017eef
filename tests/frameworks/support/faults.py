"""Causes faults: of one of two hosts of benchmarks/netlab, which train over a real network; and of one of two ranks of a Keras job. Used
by tests and by benchmarks/reliability/faults.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grace_ext.cli.check import tool

from .launch import JOBS, environment, launcher

JOB = str(JOBS / "fault_job.py")
ENGINES = ("torchrun", "horovodrun", "mpirun")
FAULTS = ("killed", "cut", "stopped")
HOSTS = ["-np", "2", "-H", "h1:1,h2:1"]
MPIRUN = ["--allow-run-as-root", "-bind-to", "none", *HOSTS, "-mca", "btl_tcp_if_include", "eth0", "-mca", "oob_tcp_if_include", "eth0"]
MPIRUN += [word for name in ("PYTHONPATH", "OMP_NUM_THREADS", "GRACE_EXT_TIMEOUT") for word in ("-x", name)]


def started(lab: Any, engine: str, folder: Path, steps: int, timeout: float) -> list[subprocess.Popen[Any]]:
    """Starts a job with one rank on each host. Returns its launchers."""
    by = [JOB, "exchange" if engine == "mpirun" else "wrapper", str(folder), str(steps)]
    with (folder / "log").open("w") as log:
        options = {"env": {**environment(), "GRACE_EXT_TIMEOUT": str(timeout)}, "stdout": log, "stderr": log, "start_new_session": True}
        if engine == "torchrun":
            nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", lab.addresses["h1"], "--master-port", "29517"]
            command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--node-rank"]
            return [lab.start([*command, str(rank), *by], host, **options) for rank, host in enumerate(lab.addresses)]
        if engine == "horovodrun":
            options_of = [str(tool("horovodrun")), "--gloo", "--disable-cache", *HOSTS, "--network-interfaces", "eth0"]
            return [lab.start([*options_of, sys.executable, *by], **options)]
        return [lab.start([str(tool("mpirun")), *MPIRUN, sys.executable, "-m", "mpi4py", *by], **options)]


def said(folder: Path, rank: int, kind: str) -> list[str]:
    """Returns the texts of a rank's log lines that begin with this word."""
    file = folder / f"{rank}.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(kind + " ")]


def until(condition: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def runs(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def strike(lab: Any, engine: str, fault: str, folder: Path, *, timeout: float, lasts: float, steps: int) -> dict[str, Any]:
    """Kills (SIGKILL) or stops (SIGSTOP) rank 1's process, or cuts its host's link, in the middle of a collective; after `lasts` seconds a
    stopped process continues and a link is restored. timeout: GRACE_EXT_TIMEOUT. steps: how many the job makes.

    Returns 'exits' of the launchers, 'errors' by rank ('' if it had none), 'ended' ranks, the different final 'weights', 'seconds' from the
    fault to the error of rank 0 or, without one, to the end, and 'left', the ranks that still ran 60 s after the timeout."""
    launchers = started(lab, engine, folder, steps, timeout)
    try:
        under_way = lambda: all(len(said(folder, rank, "STEP")) >= 2 for rank in (0, 1))  # noqa: E731
        until(lambda: under_way() or any(launcher.poll() is not None for launcher in launchers), 300)
        assert under_way(), (folder / "log").read_text()[-3000:]
        pids = [int(said(folder, rank, "PID")[0]) for rank in (0, 1)]
        begun = time.monotonic()
        if fault == "cut":
            lab.cut("h2")
        else:
            os.kill(pids[1], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        mended = fault == "killed"
        over = lambda: not any(map(runs, pids)) and all(x.poll() is not None for x in launchers)  # noqa: E731
        first = lambda: bool(said(folder, 0, "ERROR") or said(folder, 0, "END"))  # noqa: E731
        seconds = None
        while not over() and time.monotonic() < begun + max(timeout, lasts) + 60:
            if seconds is None and first():
                seconds = time.monotonic() - begun
            if not mended and time.monotonic() > begun + lasts:
                lab.mend("h2") if fault == "cut" else runs(pids[1]) and os.kill(pids[1], signal.SIGCONT)
                mended = True
            time.sleep(0.05)
        left = [rank for rank, pid in enumerate(pids) if runs(pid)]
        return {
            "exits": [launcher.poll() for launcher in launchers],
            "errors": [(said(folder, rank, "ERROR") or [""])[0] for rank in (0, 1)],
            "ended": [rank for rank in (0, 1) if said(folder, rank, "END")],
            "weights": sorted({x for rank in (0, 1) for x in said(folder, rank, "END")}),
            "seconds": round(time.monotonic() - begun if seconds is None else seconds, 1),
            "left": left,
        }
    finally:
        lab.mend("h2")
        for rank in (0, 1):
            for pid in map(int, said(folder, rank, "PID")):
                if runs(pid):
                    os.kill(pid, signal.SIGKILL)
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.terminate()
                try:
                    launcher.wait(20)
                except subprocess.TimeoutExpired:
                    launcher.kill()


def part_ways(engine: str, what: str, folder: Path, how: str = "graph", *, timeout: float) -> dict[str, Any]:
    """Runs jobs/fault_tf_job.py, in which rank 1 does something else (`what`, `how`: its arguments). timeout: GRACE_EXT_TIMEOUT. Horovod's
    stall check is off, which over Gloo never finds a rank unless Horovod was built by tools/build_horovod.py.

    Returns the 'error' and the last words that grace_ext 'logged' on rank 0 ('' if there are none), the 'seconds' from the moment at which
    rank 1 left (the last time that it noted) to the end of rank 0's training, 'others', the error of rank 1, the 'exit' code of the
    launcher, and 'left', the ranks that still ran 30 s later."""
    command = [*launcher(engine, 2), str(JOBS / "fault_tf_job.py"), what, str(folder), how]
    variables = {**environment(), "GRACE_EXT_TIMEOUT": str(timeout), "HOROVOD_STALL_CHECK_DISABLE": "1"}
    with (folder / "log").open("w") as log:
        options: dict[str, Any] = {"env": variables, "stdout": log, "stderr": log, "start_new_session": True}
        started = subprocess.Popen(command, **options)
    try:
        over = lambda: said(folder, 0, "ERROR") or said(folder, 0, "END")  # noqa: E731
        pids = lambda: [int(said(folder, rank, "PID")[0]) for rank in (0, 1) if said(folder, rank, "PID")]  # noqa: E731
        until(lambda: over() or started.poll() is not None or (len(pids()) == 2 and not runs(pids()[0])), 150 + timeout)
        ended = time.time()
        (folder / "over").touch()
        until(lambda: started.poll() is not None and not any(map(runs, pids())), 30)
        error = (said(folder, 0, "ERROR") or [""])[0].partition(" ")
        left_at = float((said(folder, 1, "LEFT") or said(folder, 1, "ERROR") or ["nan"])[-1].split()[0])
        return {
            "error": error[2],
            "others": (said(folder, 1, "ERROR") or [""])[0].partition(" ")[2],
            "logged": (said(folder, 0, "LOG") or [""])[-1],
            "seconds": round((float(error[0]) if error[0] else ended) - left_at, 1),
            "exit": started.poll(),
            "left": [rank for rank, pid in enumerate(pids()) if runs(pid)],
        }
    finally:
        for rank in (0, 1):
            for pid in map(int, said(folder, rank, "PID")):
                if runs(pid):
                    os.kill(pid, signal.SIGKILL)
        if started.poll() is None:
            started.kill()
            started.wait(20)
