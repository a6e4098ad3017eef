"""Runs jobs that stop after 5 of 10 steps and resume in new processes, for test_resume_jobs.py and benchmarks/reliability/resume.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import grace_ext
from grace_ext.checkpoints.statefile import decode, driver_states

from .launch import job

SPECS = ("topk", "powersgd", "ef21", "shards", "policy")


class Case(NamedTuple):
    title: str
    engine: str
    script: str
    #: Number of ranks of the first job, and of the jobs that resume from it.
    ranks: int
    then: tuple[int, ...]
    kinds: tuple[str, ...]


def kinds(*apis: str) -> tuple[str, ...]:
    """Returns all specs for the first API, and topk alone for the others."""
    return tuple(f"{apis[0]}:{spec}" for spec in SPECS) + tuple(f"{api}:topk" for api in apis[1:])


TORCH, TENSORFLOW, MPI = (f"resume_{name}_job.py" for name in ("torch", "tf", "mpi"))
CASES = (
    Case("torchrun, policies, pipelines, bfloat16", "torchrun", TORCH, 2, (2, 3), ("wrapper:nested", "wrapper:pipeline", "ddp:bf16")),
    Case("torchrun, two levels", "torchrun", TORCH, 4, (4, 2), ("wrapper:levels", "ddp:levels")),
    Case("horovodrun, torch, policies, two levels", "horovodrun", TORCH, 4, (4, 2), ("wrapper:levels", "wrapper:nested", "bind:levels")),
    Case("horovodrun, TF, policies, two levels", "horovodrun", TENSORFLOW, 4, (4, 2), ("keras:levels", "keras:nested", "keras:bf16")),
    Case("mpirun, policies, two levels", "mpirun", MPI, 4, (4, 2), ("mpi:levels", "mpi:nested", "mpi:pipeline", "mpi:bf16")),
    Case("torchrun (wrapper, DDP hook, LocalSGD)", "torchrun", TORCH, 2, (2, 3), kinds("wrapper", "ddp", "local")),
    Case("torchrun, from 3 ranks", "torchrun", TORCH, 3, (2,), kinds("wrapper", "ddp", "local")),
    Case("horovodrun, torch (wrapper, bind, LocalSGD)", "horovodrun", TORCH, 2, (2, 3), kinds("wrapper", "bind", "local")),
    Case("horovodrun, TF (Keras, tape, bind, LocalSGD)", "horovodrun", TENSORFLOW, 2, (2, 3), kinds("keras", "tape", "bind", "local")),
    Case("horovodrun, tf.train.Checkpoint alone", "horovodrun", TENSORFLOW, 2, (2,), ("checkpoint:topk", "checkpoint:ef21")),
    Case("mpirun (Exchange)", "mpirun", MPI, 2, (2, 3), kinds("mpi")),
    Case("mpirun, from 3 ranks", "mpirun", MPI, 3, (2,), kinds("mpi")),
)  # fmt: skip


def outcomes(case: Case, folder: Path, timeout: float = 600) -> dict[str, str]:
    """Runs the jobs of a case. Returns 'equal', or what differs, by '<ranks> -> <ranks> <kind>'."""
    job(case.engine, case.ranks, case.script, "first", str(folder), *case.kinds, timeout=timeout)
    found = {}
    for ranks in case.then:
        job(case.engine, ranks, case.script, "second", str(folder), *case.kinds, timeout=timeout)
        for kind in case.kinds:
            compare = _same_bits if ranks == case.ranks else _same_effect
            found[f"{case.ranks} -> {ranks} {kind}"] = compare(folder, kind, case.ranks, ranks)
    return found


def _said(folder: Path, what: str, size: int, kind: str) -> list[str]:
    return [json.loads((folder / f"{what}-{rank}-of-{size}.json").read_text())[kind] for rank in range(size)]


def _same_bits(folder: Path, kind: str, old: int, new: int) -> str:
    """Compares every rank's model with that of an uninterrupted training."""
    first, second = _said(folder, "first", old, kind), _said(folder, "second", new, kind)
    return "equal" if first == second else f"{second} is not {first}"


def _same_effect(folder: Path, kind: str, old: int, new: int) -> str:
    """Compares the ranks' mean of what was unsent before and after loading, and the ranks' final models with each other."""
    before, after = _unsent(folder / kind), _unsent(folder / f"{kind}.loaded.{new}")
    if set(before) != set(after) or not before:
        return f"arrays are {sorted(after)}, were {sorted(before)}"
    # The tolerance is relative to the largest element: ef21's mean is recomputed from the estimates, without the rounding of earlier steps.
    off = [key for key, x in before.items() if not np.allclose(x, after[key], rtol=0, atol=1e-6 * np.abs(x).max(initial=0))]
    if off:
        return f"the mean over the ranks changed: {off}"
    models = set(_said(folder, "second", new, kind))
    return "equal" if len(models) == 1 else f"the ranks ended with different models: {models}"


def _unsent(folder: Path) -> dict[str, np.ndarray]:
    """Returns by key what the ranks' arrays amount to in the aggregate, in float64: shards joined, other arrays averaged. Settings that a
    rank may take over from another amount to nothing."""
    manifest = json.loads((folder / "manifest.json").read_text())
    trees = [list(driver_states(decode((folder / entry["name"]).read_bytes()))) for entry in manifest["files"]]
    found = {}
    for place, states in enumerate(zip(*trees, strict=True)):
        parts = [part for leaf in grace_ext.grace(states[0]["spec"]).leaves for part in (leaf.memory, leaf.compressor, leaf.communicator)]
        settings = {key for outer in parts for part in outer.nested() for key in part.borrowed_state}
        for key in states[0]["state"]:
            if key.split("/", 1)[0] in settings:
                continue
            arrays = [np.float64(state["state"][key]) for state in states]
            found[f"{place}/{key}"] = np.concatenate(arrays) if key.startswith("shard_") else np.mean(arrays, axis=0)
    return found
