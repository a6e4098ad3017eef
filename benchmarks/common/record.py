"""Records where and when a measurement was made: machine, versions, commit, date. No host names, no paths."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from grace_ext.planning.bench import cores, processor

PACKAGES = ("torch", "tensorflow", "tensorflow-cpu", "horovod", "numpy", "numba", "keras", "mpi4py")


def machine() -> str:
    """Describes processor, cores, memory and operating system in words."""
    try:
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (OSError, ValueError):
        memory = ""
    return f"{processor()}, {cores()} cores{memory}, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Returns the checkout's commit, with '+changes' if the package or the benchmarks differ from it; 'unknown' outside of git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/grace_ext", ":/benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stamp() -> dict[str, Any]:
    """Returns date, machine, versions and commit, for the head of a JSON document."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.strftime("%Y-%m-%d %H:%M UTC"), "machine": machine(), "versions": versions(), "commit": commit()}


def reliability(topic: str, table: dict[str, Any]) -> None:
    """Writes a table of docs/reliability.md (title, text, columns, rows, commands) to the folder that tools/reliability.py reads."""
    file = _reliability(topic)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**stamp(), **table}, indent=1) + "\n")


def reliability_rows(topic: str) -> list[list[Any]]:
    """Returns the rows that were written earlier, so that a script can run some cases and keep the other rows."""
    rows: list[list[Any]] = reliability_table(topic).get("rows", [])
    return rows


def reliability_table(topic: str) -> dict[str, Any]:
    """Returns the whole table that was written earlier; {} if there is none."""
    file = _reliability(topic)
    return json.loads(file.read_text()) if file.exists() else {}


def _reliability(topic: str) -> Path:
    return Path(__file__).parents[1] / "results" / "reliability" / f"{topic}.json"
