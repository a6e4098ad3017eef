"""No run ends by the state of the kernels' cache: files that are damaged or missing, a full disk, a read-only one, another processor."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from grace_ext.arrays import kernels
from grace_ext.arrays.kernels import cache

pytestmark = pytest.mark.skipif(not kernels.enabled(), reason="GRACE_EXT_KERNELS=0, or no numba")

SCRIPT = """
import hashlib, numpy as np, grace_ext
from grace_ext.arrays.compiled import CompiledOps
digest = hashlib.sha256()
for text in ("topk(ratio=0.01) + residual", "efsignsgd + residual", "qsgd(bits=4)", "randomk + residual", "fp16"):
    cluster = grace_ext.LocalCluster(grace_ext.grace(text), 2)
    for step in range(2):
        rng = np.random.default_rng(step)
        out = cluster.step([{"w": rng.standard_normal((200, 300), np.float32)} for _ in range(2)])
        digest.update(out["w"].tobytes())
print(isinstance(cluster.ops, CompiledOps), digest.hexdigest())
"""
PLAIN = "plain operations"
COMPILING = "compiling kernels"


def run(folder: Path, script: str = SCRIPT, *, largest: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with this cache. Files may grow to `largest` bytes: a larger one fails like one on a full disk."""
    variables = {**os.environ, "GRACE_EXT_CACHE": str(folder), "GRACE_EXT_KERNELS": "1", **environment}
    limit = None if largest is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def expected() -> str:
    """Plain operations give the numbers that the script prints with compiled kernels."""
    done = run(Path(os.devnull), GRACE_EXT_KERNELS="0")
    return done.stdout.replace("False ", "True ")


@pytest.fixture
def filled(tmp_path) -> Path:
    """A cache that holds all kernels."""
    kernels.load()
    shutil.copytree(kernels.kernels_folder(), tmp_path / "cache" / "kernels" / kernels.kernels_folder().name)
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "kernels").rglob("*.*") if path.is_file())


@pytest.fixture
def mounted(tmp_path) -> Iterator[Path]:
    """A file system of its own, if this user may mount one."""
    place = tmp_path / "mounted"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root can mount file systems")
    yield place
    subprocess.run(["umount", place], check=True)


def test_damaged_files_are_compiled_again(filled, expected):
    """A file that is empty, cut, changed in one bit or gone is compiled again, with a line that names it, and is whole afterwards."""
    empty, cut, changed, gone = chosen = [path for path in files(filled) if path.name.startswith(("elementwise.", "random."))][:4]
    whole = changed.read_bytes()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-100])
    changed.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    gone.unlink()
    first, second = run(filled), run(filled)
    assert first.stdout == second.stdout == expected
    assert all(f"{path} is missing or damaged: compiling it again" in first.stderr for path in chosen)
    assert second.stderr == ""


def test_damage_where_nothing_can_be_written(filled, expected):
    """A damaged file on a full disk is compiled again for this process."""
    damaged = files(filled)[0]
    damaged.write_bytes(b"")
    done = run(filled, largest=100)
    assert done.stdout == expected and "compiling it again" in done.stderr and PLAIN not in done.stderr
    assert damaged.read_bytes() == b""


def test_a_full_disk(tmp_path, expected):
    """If kernels cannot be kept, plain operations are used: one warning, the same results, and a cache that is not taken for complete."""
    done = run(tmp_path, largest=100)
    assert done.stdout == expected.replace("True ", "False ")
    assert done.stderr.count(PLAIN + " are used") == 1 and "GRACE_EXT_CACHE" in done.stderr
    assert not any(path.name in ("complete", "compiled") for path in tmp_path.rglob("*"))


def test_a_device_that_is_full(mounted, expected):
    with suppress(OSError), (mounted / "ballast").open("wb") as ballast:
        ballast.write(bytes(17 << 20))
    done = run(mounted / "cache")
    assert done.stdout == expected.replace("True ", "False ") and done.stderr.count(PLAIN + " are used") == 1
    assert "No space left on device" in done.stderr


def test_a_complete_cache_that_is_only_read(mounted, filled, tmp_path, expected):
    """It is used without compiling; nothing is said, and no folder is left behind."""
    shutil.copytree(filled, mounted / "cache")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    left = tmp_path / "temporary"
    left.mkdir()
    done = run(mounted / "cache", TMPDIR=str(left))
    assert done.stdout == expected and done.stderr == "" and not list(left.iterdir())


def test_an_empty_cache_that_is_only_read(mounted, tmp_path, expected):
    """Nobody compiles: plain operations, with one warning that says where kernels were looked for and what to do."""
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    left = tmp_path / "temporary"
    left.mkdir()
    done = run(mounted / "cache", TMPDIR=str(left))
    assert done.stdout == expected.replace("True ", "False ") and COMPILING not in done.stderr and not list(left.iterdir())
    assert done.stderr.count(PLAIN + " are used") == 1 and str(mounted) in done.stderr and "grace-ext compile --into" in done.stderr


def test_a_cache_folder_that_is_a_file(tmp_path, expected):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run(blocked)
    assert done.stdout == expected.replace("True ", "False ") and done.stderr.count(PLAIN + " are used") == 1


def test_without_a_compiler(tmp_path, expected):
    """NUMBA_DISABLE_JIT=1 means plain operations, without a warning, and leaves the cache alone."""
    done = run(tmp_path / "cache", NUMBA_DISABLE_JIT="1")
    assert done.stdout == expected.replace("True ", "False ") and done.stderr == ""
    assert not (tmp_path / "cache").exists()


def test_a_numba_that_does_not_work(tmp_path, expected):
    """A numba that cannot be imported, as one that is too old for its numpy, means plain operations and one warning with numba's reason."""
    broken = tmp_path / "numba"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('Numba needs NumPy 0.9 or less')")
    done = run(tmp_path / "cache", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.stdout == expected.replace("True ", "False ")
    assert done.stderr.count(PLAIN + " are used") == 1 and "Numba needs NumPy 0.9 or less" in done.stderr


OTHER = """
import numpy as np
from grace_ext.arrays.kernels import cache, compile, parts
from grace_ext.arrays.kernels.select import collect
x = np.random.default_rng(0).standard_normal(10_001).astype(np.float32)
positions, values = np.empty(20_000, np.int64), np.empty(20_000, np.float32)
found, came_to = collect(x, np.float32(1).view(np.uint32), positions, values, x[:0])
assert came_to == len(x) and (positions[:found] == np.flatnonzero(abs(x) >= 1)).all()
print(cache.kernels_folder().name, compile.compresses(), "half" in parts()[1])
"""


def test_other_processors_have_a_folder_of_their_own(tmp_path):
    """Kernels are compiled for the processor that numba is told, without instructions that it lacks."""
    plain = run(tmp_path, OTHER, NUMBA_CPU_NAME="generic").stdout.split()
    named = run(tmp_path, OTHER, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="-avx512f").stdout.split()
    assert len({plain[0], named[0], kernels.kernels_folder().name}) == 3
    assert plain[1] == named[1] == "False"
    if os.uname().machine == "x86_64":
        assert plain[2] == named[2] == "False"
    assert {path.parent.name for path in files(tmp_path)} == {plain[0], named[0]}


def test_what_is_kept_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "kernels_folder", lambda: tmp_path)
    assert cache.kept("a.b") is None
    cache.keep("a.b", b"data")
    assert cache.kept("a.b") == b"data" and [path.name for path in tmp_path.iterdir()] == ["a.b"]
    (tmp_path / "a.b").write_bytes(b"short")
    assert cache.kept("a.b") is None


def test_compiling_into_a_folder(filled, expected):
    """`grace-ext compile --into FOLDER` adds what is missing; then the folder is used without compiling."""
    removed = files(filled)[:3]
    for path in [*removed, removed[0].parent / "complete"]:
        path.unlink()
    command = [sys.executable, "-m", "grace_ext", "compile", "--into", filled]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and str(removed[0].parent) in done.stdout and f"GRACE_EXT_CACHE={filled}" in done.stdout
    assert all(path.exists() for path in removed)
    used = run(filled)
    assert used.stdout == expected and used.stderr == ""


def test_compiling_into_a_folder_that_cannot_be_written(tmp_path):
    """The command says so in one line, and what to do."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    command = [sys.executable, "-m", "grace_ext", "compile", "--into", blocked / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "cannot be written" in done.stderr


def test_compiling_without_a_compiler(tmp_path):
    command = [sys.executable, "-m", "grace_ext", "compile", "--into", tmp_path]
    done = subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "NUMBA_DISABLE_JIT=1" in done.stderr and not list(tmp_path.iterdir())
