"""Tests the numpy Exchange in real MPI jobs (cases: jobs/mpi_*job.py), its example, and the wrappers under MPI's launchers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import lru_cache

import pytest

import grace_ext
from grace_ext.errors import UnsupportedError

from .support import training
from .support.launch import JOBS, ROOT, environment, job, launcher, run
from .test_jobs import Held, cases_of, held_in

EXAMPLE = str(ROOT / "examples" / "mpi_logistic.py")
TRIED = {re.match(r"\w+", spec).group() for spec in training.SPECS}
#: The specs for other engines, and with error feedback every compressor that is not among them.
SPECS = [*training.SPECS, *(f"{name} + residual" for name in grace_ext.compressors.names() if name not in TRIED)]


@pytest.fixture(autouse=True)
def no_prefix(monkeypatch):
    # Importing the numpy package sets this variable; jobs must find Open MPI themselves.
    monkeypatch.delenv("OPAL_PREFIX", raising=False)


@lru_cache
def held(engine: str, ranks: int, file: str) -> Held:
    return held_in(job(engine, ranks, file, *(SPECS if file == "mpi_job.py" else [])))


CASES = [(file, case) for file in ("mpi_job.py", "mpi_use_job.py") for case in cases_of(file)]


@pytest.mark.parametrize(("file", "case"), CASES)
def test_exchange(file, case):
    assert case in held("mpirun", 4, file)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_exchange_in_plain_python(file, case):
    pytest.importorskip("mpi4py")
    assert case in held("python", 1, file)


@pytest.mark.parametrize("how", [["suddenly"], []])
def test_a_rank_that_dies_does_not_hang_the_job(how):
    """Whether the process ends suddenly, or raises and `python -m mpi4py` aborts the job, the job ends with an error."""
    command = [*launcher("mpirun", 3), *([] if how else ["-m", "mpi4py"]), str(JOBS / "mpi_use_job.py"), "die", *how]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode and "CASE" not in ended.stdout
    assert how or "rank 1: missing parameters" in ended.stderr


@pytest.mark.parametrize(("engine", "ranks"), [("mpirun", 4), ("python", 1)])
def test_example(engine, ranks):
    pytest.importorskip("mlxtend")
    pytest.importorskip("mpi4py")
    said = json.loads(run([*launcher(engine, ranks), EXAMPLE, "--epochs", "8", "--json"]).splitlines()[-1])
    dense, compressed = said["dense"], said["compressed"]
    assert said["ranks"] == ranks
    assert dense["accuracy"] > 0.86 and compressed["accuracy"] > dense["accuracy"] - 0.04
    assert dense["bytes"] > 8 * compressed["bytes"] > 0


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
@pytest.mark.parametrize("engine", ["mpirun", "horovodrun --mpi"])
def test_wrapper_uses_horovod_under_mpi(engine, framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: pip install 'grace_ext[{framework}]'")
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed; `make horovod` builds it")
    said = job(engine, 2, "mpi_wrapper_job.py", framework)
    assert all(f"CASE {case} ok" in said for case in cases_of("mpi_wrapper_job.py"))


def test_without_mpi4py(monkeypatch):
    import grace_ext.frameworks.numpy as gnp

    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'grace_ext\[mpi\]'"):
        gnp.Exchange(grace_ext.grace("none"))
    with pytest.raises(AttributeError, match="nothing"):
        _ = gnp.nothing


def test_nothing_else_imports_mpi4py():
    use = "grace_ext.LocalCluster(grace_ext.grace('none'), 2).step([{'w': 1.0}] * 2)"
    code = f"import sys, grace_ext; {use}; print('mpi4py' in sys.modules)"
    assert run([sys.executable, "-c", code]) == "False\n"


@pytest.mark.parametrize("name", ["OPAL_PREFIX", "OMPI_COMM_WORLD_SIZE", "MPI4PY_LIBMPI"])
def test_a_chosen_mpi_is_left_alone(name, monkeypatch):
    import grace_ext.frameworks.numpy as gnp

    monkeypatch.setenv(name, "2")
    gnp._locate_open_mpi()
    assert os.environ.get("OPAL_PREFIX") == ("2" if name == "OPAL_PREFIX" else None)
