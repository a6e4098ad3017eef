"""`save` and `load` keep the state of compression in a folder: one file per rank, and a manifest.

A folder holds `manifest.json` and the files that it names, `rank-<rank>-of-<size>.<generation>.safetensors`. A save writes the files of a
new generation: each to a temporary name in the same folder, which is flushed to the disk (fsync) and renamed; then the manifest in the same
way; last, it removes the files of older generations. The new checkpoint replaces the old one at one moment, the rename of the manifest: a
save that is killed before it, or whose disk is full, leaves the old checkpoint valid. The next save removes what such a save left behind.

Ranks agree by the exchange's own collectives: after each stage every rank tells all others whether it succeeded, and if it failed on one
rank it raises on all. All ranks must see one folder; if their hosts do not share it, rank 0 does not find their files, and all ranks get
an error that says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..driver.agreement import share
from ..errors import CheckpointError, GraceError, ParameterError, UnsupportedError, shown
from ..exchange.perform import perform
from . import files
from .resize import HOW, resized, told
from .saveable import LOG, Saveable
from .statefile import driver_states, encode


def save(opt: Any, folder: str | os.PathLike) -> None:
    """Writes the state of compression of all ranks to `folder`, which is created if it does not exist. Every rank calls it, after the same
    step and with the same folder, which all hosts share; it returns on all ranks once the checkpoint is on the disk.

    opt: a DistributedOptimizer, LocalSGD optimizer (torch or Keras) or LossScaleOptimizer around one, the state of `ddp_comm_hook`, the
      result of `bind`, `tape.memory(variables)`, an Exchange, a LocalCluster.
    The checkpoint holds the state of compression, not the model and not the optimizer's own state. Save those first, under a name that
    contains the step; `load` returns the step of the checkpoint.
    Raises CheckpointError, on all ranks alike, if any rank could not write; the checkpoint before it can then still be loaded.
    """
    kept, place = _of_whole_model(opt), Path(folder)
    states: list[dict[str, Any]] = []
    written: list[Path] = []

    def begin() -> dict[str, Any]:
        states.extend(kept.read())
        files.make(place)
        nodes = [next(driver_states(state), {}).get("node") for state in states]
        return {"generation": files.last_generation(place), "states": [_summary(state) for state in states], "nodes": nodes}

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
        about = {"version": files.VERSION, "generation": generation, "size": kept.size, **summary, "nodes": nodes, "files": entries}
        files.write(place / files.MANIFEST, json.dumps(about, indent=1).encode())
        return {}

    if not kept.ranks:
        return
    said = on_all(kept, "save", begin)
    generation = 1 + max(other["generation"] for other in said)
    summary = _common([state for other in said for state in other["states"]])
    nodes = [node for other in said for node in other["nodes"]]
    try:
        told_files = on_all(kept, "save", write)
    except CheckpointError:  # it was raised on all ranks, so no manifest will name these files
        files.remove(written)
        raise
    on_all(kept, "save", publish)
    if 0 in kept.ranks:
        files.remove_others(place, {entry["name"] for other in told_files for entry in other["files"]})


def load(opt: Any, folder: str | os.PathLike, resize: str = "mean") -> int:
    """Loads the state that `save` wrote, bit for bit if the number of ranks is the same; returns the number of steps made before the save.
    Every rank calls it, before its first step or between two steps.

    resize: 'mean', 'keep' or 'reset', for another number of ranks, or with 'hierarchical' for ranks that share nodes otherwise (see
      grace_ext.resize). Each rank then reads the files of all ranks, and the log tells the norm of what the resize changed.
    Raises CheckpointError, on all ranks alike and with nothing changed, if there is no checkpoint, or it is damaged, or it does not fit on
    any rank.
    """
    if resize not in HOW:
        raise ParameterError(f"resize must be one of {', '.join(map(repr, HOW))}, got {shown(resize)}")
    kept, place = _of_whole_model(opt), Path(folder)
    if not kept.ranks:
        return int(files.read_manifest(place)[1]["step"])
    found: dict[str, Any] = {}

    def look() -> dict[str, Any]:
        text, found["manifest"] = files.read_manifest(place)
        return {"manifest": files.digest(text), "nodes": list(kept.nodes)}

    said = on_all(kept, "load", look)
    if any(other["manifest"] != said[0]["manifest"] for other in said):
        raise CheckpointError("cannot load: the ranks see different checkpoints; give all ranks one folder, which all hosts share")
    manifest, nodes = found["manifest"], [node for other in said for node in other["nodes"]]
    same = manifest["size"] == kept.size and _share_nodes_alike(manifest.get("nodes", []), nodes)

    def read() -> dict[str, Any]:
        states = [files.read(place, manifest["files"][rank]) for rank in (kept.ranks if same else range(manifest["size"]))]
        if not same:
            found["resized"], states = resized_for(states, kept, resize, nodes)
        if any(exchange for state in states for exchange in driver_states(state)):
            kept.check(states)
            found["write"] = lambda: kept.write(states)
        return {}

    on_all(kept, "load", read)
    on_all(kept, "load", lambda: found["write"]() or {} if "write" in found else {})
    for sentence in found.get("resized", ()) if 0 in kept.ranks else ():
        LOG.warning(sentence)
    return int(manifest["step"])


def _share_nodes_alike(before: list[str | None], now: list[str]) -> bool:
    """Whether the ranks that shared a node when they saved (None: their exchange knows of no nodes) share one now, and no others do."""
    return None in before or not before or [before.index(node) for node in before] == [now.index(node) for node in now]


def saveable_of(opt: Any) -> Saveable:
    """Returns what `save` and `load` need of this object. Raises GraceError if it keeps no memory."""
    while not hasattr(opt, "_saveable") and hasattr(opt, "inner_optimizer"):  # Keras's LossScaleOptimizer
        opt = opt.inner_optimizer
    if not hasattr(opt, "_saveable"):
        raise GraceError(
            f"{type(opt).__module__}.{type(opt).__name__} keeps no memory of compression; pass an object of grace_ext: the "
            "DistributedOptimizer or LocalSGD optimizer, the state of ddp_comm_hook, the result of bind, tape.memory(variables), an "
            "Exchange or a LocalCluster"
        )
    return opt._saveable()


def _of_whole_model(opt: Any) -> Saveable:
    """Returns the Saveable of an object. Raises UnsupportedError if it is of one of several shards."""
    kept = saveable_of(opt)
    if kept.shard:
        raise UnsupportedError(
            "grace_ext.save and load keep one state per rank of an exchange, and each shard of this model has an exchange of its own: give "
            "hvd.DistributedState(state) to torch.distributed.checkpoint, with the model"
        )
    return kept


# --- among ranks ------------------------------------------------------------------------------------------------------
def on_all(kept: Saveable, what: str, action: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls `action` on every rank, and returns the results of all, by rank. Raises CheckpointError on all ranks if it failed on any."""
    mine: dict[str, Any]
    own: Exception | None = None
    try:
        mine = {"gave": action()}
    except Exception as error:  # sent to the other ranks, and raised on all
        mine, own = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, GraceError) else str(error)}, error
    transport, said = kept.transport, [mine]
    if transport is not None and transport.size > 1:
        said = perform(share(transport.ops, transport, mine), transport, {})
    failed = [f"rank {rank}: {other['error']}" for rank, other in enumerate(said) if "error" in other]
    if failed:
        raise CheckpointError(f"cannot {what}: " + "; ".join(failed)) from own
    return [other["gave"] for other in said]


def _summary(state: dict[str, Any]) -> dict[str, Any]:
    """Returns what the manifest says of a rank's state: its spec and its step."""
    nothing: dict[str, Any] = {"spec": "", "step": 0}
    first = next(driver_states(state), nothing)
    return {"spec": first["spec"], "step": int(state["model"]["step"] if "model" in state else first["step"])}


def _common(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the summary that all ranks have. Raises CheckpointError if they differ."""
    if any(other != summaries[0] for other in summaries):
        raise CheckpointError(f"cannot save: the ranks are not at the same step of one exchange, as they must be: {summaries}")
    return summaries[0]


def resized_for(states: list[dict[str, Any]], kept: Saveable, how: str, nodes: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the sentences to log, and the resized states of this process's ranks. nodes: those of all ranks. Raises GraceError."""
    said: list[str] = []

    def one(trees: list[Any]) -> list[Any]:
        first = trees[0]
        if isinstance(first, dict) and next(driver_states(first), None) is first:
            if len(trees) > 1 and first["size"] == 1:
                raise GraceError("asynchronous ranks divide every message by the number of ranks, so it must not change: start anew")
            after = resized(trees, kept.size, how, nodes)
            said.append(told(trees, after, how))
            return after
        if isinstance(first, dict):
            if "plan" in first and first["step"] != first["last"]:
                raise GraceError("the ranks' models have differed since their last synchronization: call sync() on all ranks before saving")
            if any(set(tree) != set(first) for tree in trees):
                raise GraceError(f"the ranks' states are of different variables: {', '.join(sorted({k for t in trees for k in t}))[:200]}")
            columns = {key: one([tree[key] for tree in trees]) for key in first}
            return [{key: column[rank] for key, column in columns.items()} for rank in range(kept.size)]
        return [first] * kept.size

    every = one(states)
    return said, [every[rank] for rank in kept.ranks]
