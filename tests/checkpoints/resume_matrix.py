"""Compares 10 steps with 5 steps, save, a new process, load and 5 steps, for every compressor with every memory that takes it.

    python -m tests.checkpoints.resume_matrix first FOLDER SPECS.json     # trains 10 steps and prints digests; trains 5, saves to FOLDER
    python -m tests.checkpoints.resume_matrix second FOLDER SPECS.json    # loads, trains 5 steps, prints digests

Both print a JSON object with a digest per spec, of the result of step 10 and of all ranks' states after it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

import grace_ext
from grace_ext.errors import GraceError

ROOT = Path(__file__).parents[2]
SHAPES = {"a": (40,), "layer/with/slashes": (24, 18), "empty": (0, 3), "scalar": ()}
SIZE, STEPS, AT = 2, 10, 5


def every() -> tuple[list[str], int]:
    """Returns (specs, refused). specs: every compressor (all variants of the catalogue) with every memory that takes it, and all other
    specs of the catalogue. refused: how many pairs of compressor and memory cannot be composed."""
    from .. import catalog

    taken = catalog.compositions(catalog.COMPRESSORS, catalog.MEMORIES, natural_only=True)
    refused = len(catalog.COMPRESSORS) * len(catalog.MEMORIES) - len(taken)
    return list(dict.fromkeys([*taken, *catalog.ALL])), refused


def compare(specs: list[str], folder: Path) -> dict[str, str]:
    """Runs the two processes one after the other. Returns by spec 'equal', or what differs."""
    listed = folder / "specs.json"
    listed.write_text(json.dumps(specs))
    first, second = (_process(what, folder, listed) for what in ("first", "second"))
    return {spec: "equal" if first[spec] == second[spec] else f"{first[spec]} is not {second[spec]}" for spec in specs}


def _process(what: str, folder: Path, listed: Path) -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.resume_matrix", what, str(folder), str(listed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def cluster_of(spec: str, size: int = SIZE) -> grace_ext.LocalCluster:
    return grace_ext.LocalCluster(grace_ext.grace(spec), size)


def gradients(rank: int, step: int) -> dict[str, np.ndarray]:
    made = np.random.default_rng([rank, step])
    return {name: np.asarray(made.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def train(cluster: grace_ext.LocalCluster, start: int, stop: int) -> str:
    """Trains the steps. Returns a digest of the last result and of the states after it."""
    for step in range(start, stop):
        lr = 0.1 if step < 7 else 0.05  # the learning rate changes after the resume
        out = cluster.step([gradients(rank, step) for rank in range(cluster.size)], lr=lr)
    hashed = hashlib.blake2b(digest_size=8)
    for mapping in out if isinstance(out, list) else [out]:
        for name in sorted(mapping):
            hashed.update(np.asarray(mapping[name]).tobytes())
    for state in cluster.state_dict()["ranks"]:
        for key in sorted(state["state"]):
            hashed.update(key.encode() + state["state"][key].tobytes())
    return hashed.hexdigest()


def main(what: str, folder: str, listed: str) -> None:
    said = {}
    for place, spec in enumerate(json.loads(Path(listed).read_text())):
        here = Path(folder) / str(place)
        cluster = cluster_of(spec)
        try:
            if what == "first":
                said[spec] = train(cluster_of(spec), 0, STEPS)
                train(cluster, 0, AT)
                grace_ext.save(cluster, here)
            else:
                assert grace_ext.load(cluster, here) == AT
                said[spec] = train(cluster, AT, STEPS)
        except (GraceError, AssertionError) as error:
            said[spec] = f"{what}: {type(error).__name__}: {error}"
    print(json.dumps(said))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
