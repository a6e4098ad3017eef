"""Resumes training with an Exchange over MPI. See resume_steps.py; KIND is mpi:<spec>."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import resume_steps as steps  # noqa: E402

import grace_ext.frameworks.numpy as gnp  # noqa: E402

from mpi4py import MPI  # isort: skip # noqa: E402

SHAPES = {"a": (40,), "matrix": (24, 18), "empty": (0, 3), "scalar": ()}


class Job:
    """Descends on a quadratic function, different on each rank, with noise."""

    knows_parameters = False

    def __init__(self, kind: str):
        name = kind.split(":")[1]
        self.holder = gnp.Exchange(steps.SPECS[name])
        self.dtype = ml_dtypes.bfloat16 if name == "bf16" else np.float32
        self.weights = {name: np.zeros(shape, self.dtype) for name, shape in SHAPES.items()}

    def step(self, i: int) -> None:
        made = np.random.default_rng([MPI.COMM_WORLD.rank, i])
        gradients = {name: np.asarray(w - made.standard_normal(w.shape), self.dtype) for name, w in self.weights.items()}
        for name, mean in self.holder.step(gradients).items():
            self.weights[name] = np.asarray(self.weights[name] - np.float32(0.1) * mean, self.dtype)

    def arrays(self):
        return self.weights

    def memory(self):
        return self.holder.state_dict()

    def take(self, state):
        self.holder.load_state_dict(state)

    def save(self, path: Path) -> None:
        np.savez(str(path) + ".npz", **{name: np.asarray(w, np.float32) for name, w in self.weights.items()})
        path.touch()

    def load(self, path: Path) -> None:
        self.weights = {name: np.asarray(w, self.dtype) for name, w in np.load(str(path) + ".npz").items()}


steps.run(Job, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
