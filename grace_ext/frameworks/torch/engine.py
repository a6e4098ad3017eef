"""Chooses the engine of this process's collectives: Horovod if a Horovod launcher started it, else torch.distributed.

    horovodrun, or mpirun with Horovod installed     -> horovod
    torchrun, or RANK, WORLD_SIZE, MASTER_ADDR, ...  -> torch.distributed
    plain python                                     -> torch.distributed, as one rank
The environment variable GRACE_EXT_ENGINE=horovod or =torch overrides this.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from ...errors import UnsupportedError
from .. import launchers
from ..horovod import limit_waits
from .ops import HostOps, TorchOps
from .transports import DistTransport, HorovodTransport, SingleTransport, transport_of_its_own


def choose(environ: Any = os.environ) -> str:
    """Returns 'horovod' or 'torch', by the environment that the launcher made. Raises UnsupportedError."""
    forced = environ.get("GRACE_EXT_ENGINE")
    if forced:
        if forced not in ("horovod", "torch"):
            raise UnsupportedError(f"GRACE_EXT_ENGINE must be 'horovod' or 'torch', got {forced!r}")
        return forced
    if any(name in environ for name in launchers.HOROVOD):
        if importlib.util.find_spec("horovod") is None:
            raise UnsupportedError("this process was started by horovodrun, but Horovod is not installed in its Python: run `make horovod`")
        return "horovod"
    if any(name in environ for name in launchers.MPI) and "MASTER_ADDR" not in environ and importlib.util.find_spec("horovod"):
        return "horovod"
    return "torch"


ENGINE = choose()

if ENGINE == "horovod":
    import horovod.torch as api

    limit_waits()
else:
    from .dist import api as api


def transport(ops: HostOps | TorchOps, process_set: Any) -> HorovodTransport | DistTransport | SingleTransport:
    """Returns a transport among the ranks of this process set. Over torch.distributed it may make a process group, so all of them call
    it."""
    if process_set.size() == 1:
        return SingleTransport(ops)
    if ENGINE == "horovod":
        return HorovodTransport(ops, api, process_set)
    from .dist.world import group_of

    return transport_of_its_own(ops, group_of(process_set))
