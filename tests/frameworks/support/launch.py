"""Starts real jobs of several ranks, and reports their output if they fail."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grace_ext.cli.check import tool

ROOT = Path(__file__).parents[3]
JOBS = Path(__file__).parents[1] / "jobs"
# Tests run as root in containers, start more ranks than there are cores, and share the machine with other jobs.
MPI_OPTIONS = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "GROUP_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE")
# Importing grace_ext.frameworks.tensorflow without a launcher, as the suite does, sets these; jobs must choose for themselves.
ALONE = ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")


def environment() -> dict[str, str]:
    """Returns this process's environment without a launcher's variables, with one thread per rank and this checkout first."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHERS + ALONE}
    paths = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{clean.get('PYTHONPATH', '')}",
    }
    return {**clean, **paths, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}


def run(command: list[str], timeout: float = 240) -> str:
    """Runs a job and returns its stdout. Fails the test, with the end of the output, if the job fails or takes too long."""
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        said = "".join(x.decode() if isinstance(x, bytes) else x or "" for x in (error.stdout, error.stderr))
        pytest.fail(f"{' '.join(map(str, command))} took over {timeout} s\n{said[-4000:]}")
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} exited with {done.returncode}\n{(done.stdout + done.stderr)[-20000:]}")
    return done.stdout


def launcher(engine: str, ranks: int) -> list[str]:
    """Returns the command that starts a Python file on this many ranks. Skips the test, with the reason, if the engine is not installed.
    engine: 'torchrun' (and its options), 'horovodrun', 'horovodrun --mpi', 'mpirun' or 'python' (one rank)."""
    if engine == "python":
        return [sys.executable]
    if engine.startswith("torchrun"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *engine.split()[1:]]
    if engine == "mpirun":
        mpirun = tool("mpirun")
        if mpirun is None or importlib.util.find_spec("mpi4py") is None:
            pytest.skip("MPI is not installed: pip install 'grace_ext[mpi]'")
        return [mpirun, *MPI_OPTIONS, "-np", str(ranks), sys.executable]
    horovodrun = tool("horovodrun")
    if horovodrun is None or importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed; `make horovod` builds it")
    # horovodrun adds the options that root needs, and does not bind processes.
    controller = ["--mpi", "--mpi-args=--oversubscribe"] if engine == "horovodrun --mpi" else ["--gloo"]
    return [horovodrun, *controller, "-np", str(ranks), sys.executable]


def job(engine: str, ranks: int, name: str, *args: str, timeout: float = 240) -> str:
    """Runs a file of tests/frameworks/jobs as a job. Returns its stdout."""
    return run([*launcher(engine, ranks), str(JOBS / name), *args], timeout)
