"""Tests the Triton kernels without a GPU, in processes of their own: in Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import lru_cache
from unittest import mock

import pytest

from .support.launch import environment, job
from .test_jobs import Held, cases_of, held_in

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'grace_ext[triton]' (Linux)"
)


@lru_cache
def held(file: str, folder: str) -> Held:
    """Returns the cases that hold. Kernels are compiled anew into this folder: Triton keeps those of earlier runs in the user's cache."""
    chosen = {"TRITON_INTERPRET": str(int(file == "triton_job.py")), "TRITON_CACHE_DIR": folder, "GRACE_EXT_KERNELS": "1"}
    with mock.patch.dict(os.environ, chosen):
        return held_in(job("python", 1, file, timeout=900))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", cases_of("triton_job.py"))
def test_same_bytes_as_on_a_cpu(case, folder):
    assert case in held("triton_job.py", folder)


@pytest.mark.parametrize("case", cases_of("triton_compile_job.py"))
def test_compiles(case, folder):
    assert case in held("triton_compile_job.py", folder)


def test_importing_the_package_imports_no_triton():
    asked = "import sys, grace_ext; assert 'triton' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", asked], env=environment(), check=True, timeout=240)
