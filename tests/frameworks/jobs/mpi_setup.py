"""Code that mpi_job.py and mpi_use_job.py share: gradients by rank and step, and comparisons."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

import grace_ext.frameworks.numpy as gnp  # before mpi4py, because otherwise plain python cannot start MPI

from mpi4py import MPI  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # for cases.py

WORLD, ARGUMENTS = MPI.COMM_WORLD, sys.argv[1:]
del sys.argv[1:]  # run_cases would take them for names of cases
RANK, SIZE = WORLD.rank, WORLD.size
TOPK = "topk(ratio=0.1) + residual"
SHAPES = {
    "scalar": ((), "float32"), "empty": ((0, 3), "float32"), "bias": ((7,), "float32"), "matrix": ((40, 30), "float32"),
    "kernel": ((4, 3, 3, 3), "float32"), "half": ((50, 4), "float16"), "brain": ((33,), "bfloat16"), "wide": ((33, 9), "float64"),
    "strided": ((60, 50), "float32"),
}  # fmt: skip


class Ranks:
    """Provides the functions of Horovod that run_cases needs."""

    rank = staticmethod(lambda: RANK)
    allgather_object = staticmethod(WORLD.allgather)


def gradients(rank, step):
    made = {}
    for i, (name, (shape, dtype)) in enumerate(SHAPES.items()):
        x = np.random.default_rng([step, rank, i]).standard_normal(shape[::-1] if name == "strided" else shape)
        made[name] = np.asarray(x).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return {**made, "strided": made["strided"].T}


def everyones(step, size=SIZE):
    return [gradients(rank, step) for rank in range(size)]


def exchange(spec=TOPK, comm=None, **options):
    return gnp.Exchange(spec, comm, simulate=True, **options)


def assert_close(got, expected, tolerance):
    """Asserts equal shapes and dtypes, and errors of at most `tolerance` times each array's largest magnitude (for 16-bit results, one last
    bit, because they are rounded from the sums)."""
    for name, want in expected.items():
        assert (got[name].shape, got[name].dtype) == (want.shape, want.dtype), name
        if want.size:
            allowed = max(tolerance, float(ml_dtypes.finfo(want.dtype).eps) if want.dtype.itemsize == 2 else 0.0)
            error = np.abs(got[name].astype("f8") - want.astype("f8")).max()
            assert error <= allowed * np.abs(want.astype("f8")).max(), (name, error)
