"""Defines a case of mix_fuzz.py and its gradients, and what a broken property is."""

from __future__ import annotations

import faulthandler
import logging
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace_ext.testing.inputs import DTYPES

#: The usual learning rate: a power of two, so that multiplying by it is exact.
LR = 0.125


class Broken(AssertionError):
    """Something that must be true of every mix is not. invariant: what. about: what tells one fault of that kind from another."""

    def __init__(self, invariant: str, text: str, about: str = ""):
        self.invariant, self.about = invariant, about
        super().__init__(f"{invariant}: {text}")


@dataclass(frozen=True)
class Tensor:
    """One parameter, and what its gradients are like (see `gradient`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    kind: str = "normal"


@dataclass(frozen=True)
class Bad:
    """Values that are not finite, in a share of one tensor's elements, at least in one, at one step: on one rank, or on all (-1)."""

    step: int
    tensor: int
    share: float = 0.0
    rank: int = -1
    value: float = float("nan")


@dataclass(frozen=True)
class Case:
    """One run. path: how it is repeated. load_at: the step before which it is saved and loaded, and how: by state_dict, by
    grace_ext.save, or for another number of ranks ('resize'). long: a property of many steps that is checked instead."""

    spec: str
    tensors: tuple[Tensor, ...]
    size: int = 2
    per_node: int = 1
    steps: int = 3
    seed: int = 0
    data: int = 0
    rates: tuple[float, ...] = (LR,)
    bad: Bad | None = None
    path: str = ""
    load_at: int | None = None
    load_by: str = "state_dict"
    long: str = ""

    def rate(self, step: int) -> float:
        return self.rates[step % len(self.rates)]


def gradients(case: Case, step: int) -> list[dict[str, np.ndarray]]:
    """Returns every rank's gradients of a step, the same at every call."""
    made = [
        {
            t.name: np.asarray(_values(t, np.random.default_rng([case.data, rank, step, i]), rank), DTYPES[t.dtype])
            for i, t in enumerate(case.tensors)
        }
        for rank in range(case.size)
    ]
    bad = case.bad
    if bad and bad.step == step and bad.tensor < len(case.tensors):
        for rank in range(case.size) if bad.rank < 0 else [bad.rank % case.size]:
            tensor = made[rank][case.tensors[bad.tensor].name]
            where = np.random.default_rng([case.data, rank]).random(tensor.shape) < bad.share
            if tensor.size:
                tensor[where] = bad.value
                tensor.reshape(-1)[tensor.size // 2 :][:1] = bad.value
    return made


def _values(tensor: Tensor, rng: np.random.Generator, rank: int) -> Any:
    """Returns float64 values of the tensor's kind. Halves have a smaller range, so what is tiny or huge is so in them."""
    kind, shape, half = tensor.kind, tensor.shape, tensor.dtype == "float16"
    x = rng.standard_normal(shape)
    if kind == "grid":  # sums are exact
        return np.round(x * 64) / 64
    if kind == "sparse":
        return x * (rng.random(shape) < 0.05)
    if kind == "zeros" or kind == "one rank" and rank:
        return np.zeros(shape)
    if kind == "constant":
        return np.full(shape, -0.75)
    if kind == "tiny":
        return x * (1e-7 if half else 1e-38)
    if kind == "subnormal":
        return np.full(shape, 6e-8 if half else 1.4e-45)
    if kind == "huge":
        return np.sign(x) * (6e4 if half else 3e38)
    if kind == "wide":
        return x * 10.0 ** rng.uniform(*((-7, 4) if half else (-44, 37)), shape)
    return x


def named(error: BaseException) -> str:
    """Returns an error as text: what it is, says, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({file_of(frame)}:{frame.lineno})"


def file_of(frame: traceback.FrameSummary) -> str:
    return "/".join(frame.filename.split("/")[-2:])


def quiet() -> None:
    """Prepares a process: what is drawn at random warns and logs much, and a crash should say where it was."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    logging.getLogger("grace_ext").setLevel(logging.CRITICAL)
    faulthandler.enable()
