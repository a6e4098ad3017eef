"""`DistributedState`: the state of compression for torch.distributed.checkpoint (DCP).

DCP assumes that what is not sharded is the same on all ranks: of values with the same key it writes one, and all ranks load that. So each
rank's state has a key of its own here. The value is the bytes of a state file (statefile.py): DCP compares the sizes of tensors before it
loads, and those of a memory depend on the step and on what a policy has chosen.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from ...checkpoints.checkpoint import on_all, resized_for, saveable_of
from ...checkpoints.saveable import LOG, Saveable
from ...checkpoints.statefile import decode, driver_states, encode
from ...errors import GraceError, ParameterError, UnsupportedError, shown
from .dcp import DCP, keep
from .fsdp import FSDPState
from .local import LocalOptimizer

#: DCP's error for a checkpoint of another number of ranks names the key that it lacks, so the key says what to do.
KEY = "rank {} of {} (if another number of ranks saved this checkpoint, pass that number to DistributedState as ranks=)"
SHARD_KEY = "shard {}, replica {} of {} (if other numbers saved this checkpoint, pass them to DistributedState as shards= and ranks=)"


class _ForLoading:
    """Stands where `dcp.load` puts the state of another number of ranks. `dcp.save` cannot write it."""

    def __reduce__(self) -> NoReturn:
        raise GraceError("DistributedState(..., ranks=n) loads a checkpoint of n other ranks; to save, make one without ranks=")


class DistributedState:
    """Gives the state of compression to torch.distributed.checkpoint, so that every rank gets its own back:

        memory = hvd.DistributedState(optimizer)
        dcp.save({"grace_ext": memory, **others}, checkpoint_id=folder)
        dcp.load({"grace_ext": memory, **others}, checkpoint_id=folder)

    kept: a DistributedOptimizer, a LocalSGD optimizer, or the state of `ddp_comm_hook` or `fsdp_hook`. With LocalSGD every rank's
      parameters and its optimizer's state are kept, too, because they differ by rank.
    ranks: how many ranks saved the checkpoint, to load one of another number of ranks. Each rank then reads the state of all of them, and
      gets what `grace_ext.load(..., resize='mean')` would give it. Saving with another number of ranks raises an error. For `fsdp_hook` it
      is the number of replicas.
    shards: for `fsdp_hook`, how many shards of each replica saved the checkpoint, to load one of another number. Each rank reads the states
      of the shards that had a part of its own.

    Every rank calls `dcp.save` or `dcp.load`, between two steps; a rank outside the optimizer's process set saves and loads nothing. The
    state is a copy, so `dcp.async_save` may write it while training continues. On the same number of ranks training resumes bit for bit.
    Raises GraceError if `kept` keeps no memory, and UnsupportedError for an exchange over Horovod, which DCP does not know. If the
    checkpoint is of another number of ranks, `dcp.load` raises its CheckpointException, and if it has another spec or other parameters,
    a CheckpointError: on all ranks, and nothing of the memory has changed.
    """

    def __init__(self, kept: Any, ranks: int | None = None, *, shards: int | None = None):
        for name, number in (("ranks", ranks), ("shards", shards)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ParameterError(f"{name} must be the number of {name} that saved the checkpoint, at least 1, got {shown(number)}")
        if shards is not None and not isinstance(kept, FSDPState):
            raise ParameterError(f"shards= is for the state of fsdp_hook, and this is {type(kept).__name__}")
        self._of, self._ranks = kept, ranks
        self._resharding = None if shards is None else kept.resharding(shards)
        self._saveable()
        if hasattr(kept, "_drivers"):
            keep(kept._drivers())

    def _saveable(self) -> Saveable:
        saveable = saveable_of(self._of)
        if len(saveable.ranks) < saveable.size and not dist.is_initialized():
            raise UnsupportedError(f"this exchange runs over Horovod, and {DCP} needs torch.distributed; use grace_ext.save")
        return saveable

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of this process's ranks as bytes. For another number of ranks it returns what `dcp.load` replaces."""
        saveable = self._saveable()
        if not saveable.ranks:
            return {}
        keys = self._keys(saveable)
        if self._resharding is not None or self._ranks not in (None, saveable.size):
            return {key: _ForLoading() for of_one in keys for key in of_one}
        return {key: encode({"memory": state, "own": self._own()}) for (key,), state in zip(keys, saveable.read(), strict=True)}

    def _keys(self, saveable: Saveable) -> list[list[str]]:
        """Returns the keys of what is saved, or loaded: for each rank that saves it, those of the shards."""
        size = self._ranks or saveable.size
        ranks = saveable.ranks if size == saveable.size else range(size)
        places = [saveable.shard] if self._resharding is None else self._resharding.places
        return [[SHARD_KEY.format(place, r, size) if place else KEY.format(r, size) for place in places] for r in ranks]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the result of `state_dict` after `dcp.load` has read into it. Raises CheckpointError, on all ranks, if it does not fit."""
        saveable = self._saveable()
        size = self._ranks or saveable.size
        if not saveable.ranks:
            return
        found: dict[str, Any] = {}
        nodes = [node for other in on_all(saveable, "load", lambda: {"nodes": list(saveable.nodes)}) for node in other["nodes"]]

        def read() -> dict[str, Any]:
            memories, owns = [], []
            for keys in self._keys(saveable):
                data = [state_dict.get(key) for key in keys]
                if not all(isinstance(one, bytes) for one in data):
                    raise GraceError(f"this state was not read by {DCP}; pass the DistributedState itself to dcp.load")
                states = [decode(one) for one in data if isinstance(one, bytes)]
                shards = [state["memory"] for state in states]
                memories.append(shards[0] if self._resharding is None else self._resharding.joined(shards))
                owns.append(states[0]["own"])
            found["own"] = owns[saveable.ranks[0] if size != saveable.size and saveable.ranks[0] < size else 0]
            if size != saveable.size:
                found["resized"], memories = resized_for(memories, saveable, "mean", nodes)
            if any(exchange for memory in memories for exchange in driver_states(memory)):
                saveable.check(memories)
                found["memories"] = memories
            return {}

        def write() -> dict[str, Any]:
            self._take_own(found["own"])
            if "memories" in found:
                saveable.write(found["memories"])
            return {}

        on_all(saveable, "load", read)
        on_all(saveable, "load", write)
        for sentence in found.get("resized", ()) if 0 in saveable.ranks else ():
            LOG.warning(sentence)

    # --- what differs by rank with LocalSGD ---------------------------------------------------------------------------
    def _own(self) -> dict[str, Any]:
        if not isinstance(self._of, LocalOptimizer):
            return {}
        file = io.BytesIO()
        torch.save((self._of._values(), self._of._behind.state_dict()), file)
        return {"parameters and optimizer": np.frombuffer(file.getvalue(), np.uint8)}

    def _take_own(self, own: Mapping[str, Any]) -> None:
        if isinstance(self._of, LocalOptimizer) and own:
            file = io.BytesIO(own["parameters and optimizer"].tobytes())
            parameters, optimizer = torch.load(file, map_location="cpu", weights_only=True)
            self._of._take(parameters)
            self._of._behind.load_state_dict(optimizer)
