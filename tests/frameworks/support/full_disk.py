"""Saves a checkpoint on a full disk, a tmpfs of 1 MB (needs root). Used by a test and by benchmarks/reliability/faults.py."""

from __future__ import annotations

import subprocess
import tempfile
from typing import Any

import numpy as np

import grace_ext


def save_on_a_full_disk() -> dict[str, Any]:
    """Makes a save fail. Returns 'error', its message; 'loaded', the step that the folder loads after it; 'same', whether its memory is
    that of the save before, bit for bit; and 'tidy', whether the next save, which fits again, succeeds."""
    cluster = grace_ext.LocalCluster(grace_ext.grace("topk(ratio=0.1) + residual"), 2)
    draw = np.random.default_rng(0)

    def step() -> None:
        cluster.step([{"w": draw.standard_normal(40_000).astype(np.float32)} for _ in range(2)])

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
        try:
            step()
            grace_ext.save(cluster, folder)
            before = cluster.state_dict()
            filler = open(f"{folder}/filler", "wb")  # noqa: SIM115
            with filler:
                filler.write(b"x" * 500_000)
            step()
            try:
                grace_ext.save(cluster, folder)
                error = "no error"
            except grace_ext.errors.GraceError as told:
                error = f"{type(told).__name__}: {' '.join(str(told).replace(folder, 'folder').split())}"
            again = grace_ext.LocalCluster(grace_ext.grace("topk(ratio=0.1) + residual"), 2)
            again.step([{"w": np.zeros(40_000, np.float32)}] * 2)
            loaded = grace_ext.load(again, folder)
            same = _arrays(again.state_dict()) == _arrays(before)
            subprocess.run(["rm", f"{folder}/filler"], check=True)
            grace_ext.save(cluster, folder)
            return {"error": error, "loaded": f"step {loaded}", "same": same, "tidy": grace_ext.load(again, folder) == 2}
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def _arrays(tree: Any) -> Any:
    """Returns the tree with arrays replaced by their bytes, to compare it."""
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_arrays(value) for value in tree]
    return tree.tobytes() if hasattr(tree, "tobytes") else tree
