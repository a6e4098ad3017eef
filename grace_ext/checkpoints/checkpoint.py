"""`save` and `load`: what compression keeps, in one file for each rank and a manifest.

A folder holds `manifest.json` and the files that it names, `rank-<rank>-of-<size>.<generation>.safetensors`. A save writes files of a new
generation, each to a temporary name in the same folder, to the disk (fsync), and renamed; then the manifest in the same way; and removes
the files of older generations last. The rename of the manifest is the one moment at which the new checkpoint takes the old one's place:
a save that is killed at any other moment, or whose disk is full, leaves the one before it. What such a save left behind is removed by
the next one.

Ranks agree by the exchange's own collectives: after each of these stages everyone tells everyone how it went, and where it failed on one
rank it raises on all. All ranks see one folder; hosts that share none are told so (rank 0 does not find their files).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..driver.agreement import share
from ..errors import CheckpointError, GraceError, ParameterError
from ..exchange.perform import perform
from . import files
from .resize import HOW, resized, told
from .saveable import LOG, Saveable
from .statefile import driver_states, encode


def save(opt: Any, folder: str | os.PathLike) -> None:
    """Writes the memory of compression of all ranks to `folder`, which is made where it does not exist. Every rank calls it, after the same
    step and with the same folder, which all hosts share; it returns on all when the checkpoint is on the disk.

    opt: a DistributedOptimizer, LocalSGD optimizer (torch or Keras) or LossScaleOptimizer around one, the state of `ddp_comm_hook`, what
      `bind` gave, `tape.memory(variables)`, an Exchange, a LocalCluster.
    It holds what the compression keeps, not the model nor the optimizer's own state. Save those first, under a name with the step in
    it; `load` says of which step the checkpoint is.
    Raises CheckpointError, on all ranks alike, where any rank could not write; the checkpoint before it then still loads.
    """
    kept, place = _of(opt), Path(folder)
    states: list[dict[str, Any]] = []
    written: list[Path] = []

    def begin() -> dict[str, Any]:
        states.extend(kept.read())
        place.mkdir(parents=True, exist_ok=True)
        return {"generation": files.last_generation(place), "states": [_summary(state) for state in states]}

    def write() -> dict[str, Any]:
        entries = []
        for rank, state in zip(kept.ranks, states, strict=True):
            data = encode(state)
            path = place / f"rank-{rank:05d}-of-{kept.size:05d}.{generation:09d}.safetensors"
            written.append(path)
            files.write(path, data)
            entries.append({"name": path.name, "bytes": len(data), "blake2b": files.digest(data)})
        return {"files": entries}

    def publish() -> dict[str, Any]:
        if 0 not in kept.ranks:
            return {}
        entries = [entry for other in told_files for entry in other["files"]]
        files.check_visible(place, entries)
        about = {"version": files.VERSION, "generation": generation, "size": kept.size, **summary, "files": entries}
        files.write(place / files.MANIFEST, json.dumps(about, indent=1).encode())
        return {}

    if not kept.ranks:
        return
    said = _all(kept, "save", begin)
    generation = 1 + max(other["generation"] for other in said)
    summary = _common([state for other in said for state in other["states"]])
    try:
        told_files = _all(kept, "save", write)
    except CheckpointError:  # all ranks know that it failed, so none will name these files
        files.remove(written)
        raise
    _all(kept, "save", publish)
    if 0 in kept.ranks:
        files.remove_others(place, {entry["name"] for other in told_files for entry in other["files"]})


def load(opt: Any, folder: str | os.PathLike, resize: str = "mean") -> int:
    """Goes on from what `save` wrote, bit for bit on as many ranks; returns the number of steps that had been made then. Every rank calls
    it, before its first step or between two.

    resize: for another number of ranks, 'mean', 'keep' or 'reset' (see grace_ext.resize); what it did is logged with the norm of what it
      changed. Each rank then reads the files of all.
    Raises CheckpointError, on all ranks alike and with nothing changed, where there is no checkpoint, or it is damaged, or any rank's does
    not fit.
    """
    if resize not in HOW:
        raise ParameterError(f"resize must be one of {', '.join(map(repr, HOW))}, got {resize!r}")
    kept, place = _of(opt), Path(folder)
    if not kept.ranks:
        return int(files.read_manifest(place)[1]["step"])
    found: dict[str, Any] = {}

    def read() -> dict[str, Any]:
        text, manifest = files.read_manifest(place)
        ranks = kept.ranks if manifest["size"] == kept.size else range(manifest["size"])
        states = [files.read(place, manifest["files"][rank]) for rank in ranks]
        if manifest["size"] != kept.size:
            found["resized"], states = _resized(states, kept, resize)
        if any(exchange for state in states for exchange in driver_states(state)):
            kept.check(states)
            found["write"] = kept.write
        found.update(manifest=manifest, states=states)
        return {"manifest": files.digest(text)}

    said = _all(kept, "load", read)
    if any(other != said[0] for other in said):
        raise CheckpointError("cannot load: the ranks see different checkpoints; they must name one folder, which all hosts share")
    _all(kept, "load", lambda: found["write"](found["states"]) or {} if "write" in found else {})
    if "resized" in found and 0 in kept.ranks:
        for sentence in found["resized"]:
            LOG.warning(sentence)
    return int(found["manifest"]["step"])


def _of(opt: Any) -> Saveable:
    while not hasattr(opt, "_saveable") and hasattr(opt, "inner_optimizer"):  # Keras's LossScaleOptimizer
        opt = opt.inner_optimizer
    if not hasattr(opt, "_saveable"):
        raise GraceError(
            f"{type(opt).__module__}.{type(opt).__name__} keeps no memory of compression; pass what grace_ext made: the "
            "DistributedOptimizer or LocalSGD optimizer, the state of ddp_comm_hook, what bind gave, tape.memory(variables), an Exchange "
            "or a LocalCluster"
        )
    return opt._saveable()


# --- among ranks ------------------------------------------------------------------------------------------------------
def _all(kept: Saveable, what: str, action: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Does this rank's part, and returns what all ranks' parts gave. Raises CheckpointError on all where it failed on any."""
    mine: dict[str, Any]
    own: Exception | None = None
    try:
        mine = {"gave": action()}
    except Exception as error:  # told to the others, and raised
        mine, own = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, GraceError) else str(error)}, error
    alone = kept.transport is None or kept.transport.size == 1
    said = [mine] if alone else perform(share(kept.transport.ops, kept.transport, mine), kept.transport, {})
    failed = [f"rank {rank}: {other['error']}" for rank, other in enumerate(said) if "error" in other]
    if failed:
        raise CheckpointError(f"cannot {what}: " + "; ".join(failed)) from own
    return [other["gave"] for other in said]


def _summary(state: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of a rank's state."""
    first = next(driver_states(state), {"spec": "", "step": 0})
    return {"spec": first["spec"], "step": int(state["model"]["step"] if "model" in state else first["step"])}


def _common(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    if any(other != summaries[0] for other in summaries):
        raise CheckpointError(f"cannot save: the ranks are not at the same step of one exchange: {summaries}")
    return summaries[0]


def _resized(states: list[dict[str, Any]], kept: Saveable, how: str) -> tuple[list[str], list[dict[str, Any]]]:
    """What is to be logged, and the states of this process's ranks."""
    said: list[str] = []

    def one(trees: list[Any]) -> list[Any]:
        first = trees[0]
        if next(driver_states(first), None) is first:
            if len(trees) > 1 and first["size"] == 1:
                raise GraceError("asynchronous ranks average by a number of ranks that is part of every message: start their memory anew")
            after = resized(trees, kept.size, how)
            said.append(told(trees, after, how))
            return after
        if isinstance(first, dict):
            if "plan" in first and first["step"] != first["last"]:
                raise GraceError("the ranks' models differ since their last synchronization: call sync() on all ranks before saving")
            columns = {key: one([tree[key] for tree in trees]) for key in first}
            return [{key: column[rank] for key, column in columns.items()} for rank in range(kept.size)]
        return [first] * kept.size

    every = one(states)
    return said, [every[rank] for rank in kept.ranks]
