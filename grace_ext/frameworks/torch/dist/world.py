"""Start and end of a job, ranks and sizes, process sets, and what torch.distributed has no counterpart for."""

from __future__ import annotations

import atexit
import datetime
import functools
import itertools
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ....errors import GraceError, UnsupportedError
from ...timeouts import timeout

#: Seconds that threads get to let go of tensors.
LET_GO = 0.05
_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_TIMELINE = "timelines are written by Horovod's core (torch.profiler can record collectives)"
_NOT_INITIALIZED = "not initialized; call hvd.init() first"


class HorovodInternalError(GraceError, RuntimeError):
    """A collective failed, for example because a peer died."""


@dataclass
class _World:
    """This rank's place in the job. `connected`: there is a process group; `owned`: init() made it, so shutdown() ends it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    connected: bool
    owned: bool
    sets: dict[int, ProcessSet] = field(default_factory=dict)
    set_ids: Iterable[int] = field(default_factory=lambda: itertools.count(1))


_world: _World | None = None
_generations = itertools.count()


def _current() -> _World:
    if _world is None:
        raise ValueError(_NOT_INITIALIZED)
    return _world


class ProcessSet:
    """Some of the ranks, to run collectives among them. Becomes usable through init(process_sets=...) or add_process_set()."""

    process_set_id: int | None = None
    mpi_comm = None

    def __init__(self, ranks_or_comm: Iterable[int]):
        if not isinstance(ranks_or_comm, Iterable):
            raise UnsupportedError(
                "a ProcessSet from an MPI communicator: torch.distributed does not know MPI communicators; "
                "give a list of ranks, or launch with horovodrun"
            )
        self.ranks = sorted(ranks_or_comm)
        if any(not isinstance(r, int) for r in self.ranks):
            raise ValueError(f"a ProcessSet is a list of ranks (ints), not {self.ranks}")
        self._group: dist.ProcessGroup | None = None

    def size(self) -> int | None:
        """How many ranks are in the set; None if the set is not registered."""
        return None if self.process_set_id is None else len(_registered(self).ranks)

    def rank(self) -> int | None:
        """This process's position in the set; None if the set is not registered. ValueError if this rank is not in it."""
        if self.process_set_id is None:
            return None
        me, ranks = _current().rank, _registered(self).ranks
        if me not in ranks:
            raise ValueError(f"rank {me} is not part of {self}")
        return ranks.index(me)

    def included(self) -> bool:
        """Whether this process is part of the set."""
        return _current().rank in self.ranks

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


global_process_set = ProcessSet([])
global_process_set.process_set_id = 0


def _registered(process_set: ProcessSet) -> ProcessSet:
    if _current().sets.get(process_set.process_set_id) is not process_set:
        raise ValueError(f"{process_set} is not registered: pass it to hvd.init(process_sets=[...]) or hvd.add_process_set()")
    return process_set


def group_of(process_set: ProcessSet) -> dist.ProcessGroup | None:
    """The process group to use for a collective of that set; None when this process is the whole job."""
    _registered(process_set).rank()
    return process_set._group


@functools.cache
def let_go_at_exit() -> None:
    """For processes that have collectives of torch.distributed. Gloo's threads hold tensors of the last one a moment longer than its
    result, and one that lets go of them when the interpreter has ended aborts it ("terminate called without an active exception")."""
    atexit.register(time.sleep, LET_GO)


def init(comm: Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Joins the job: an existing process group, else that of torchrun's environment variables, else this process alone.

    `comm` must name all ranks or nothing. `process_sets` are registered; "dynamic" is accepted and means none yet.
    """
    global _world
    if _world is not None:
        return
    connected = dist.is_available() and dist.is_initialized()
    owned = not connected and _launched()
    if owned:
        _connect()
    connected = connected or owned
    if connected:
        let_go_at_exit()
    rank, size = (dist.get_rank(), dist.get_world_size()) if connected else (0, 1)
    _world = _World(rank, size, *_places(rank, size, connected), connected=connected, owned=owned)
    _world.sets[0] = global_process_set
    global_process_set.ranks = list(range(size))
    global_process_set._group = dist.group.WORLD if connected else None
    atexit.register(shutdown)
    if comm is not None and list(comm) not in ([], global_process_set.ranks):
        shutdown()
        raise UnsupportedError(
            f"init(comm={comm!r}): torch.distributed has one job of all {size} ranks; "
            "use a ProcessSet for some of them, or launch with horovodrun"
        )
    for process_set in () if process_sets is None or isinstance(process_sets, str) else process_sets:
        add_process_set(process_set)


def _launched() -> bool:
    """Whether the environment describes a job. A half-described job is refused: its ranks would train apart, silently."""
    missing = [name for name in _LAUNCH if name not in os.environ]
    if not missing:
        return True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set; launch with torchrun")
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ:
        raise UnsupportedError(
            f"srun started {os.environ['SLURM_NTASKS']} tasks, but {', '.join(missing)} is not set, so each would train alone; let srun "
            "start one torchrun a node (docs/multinode.md), or set these variables"
        )
    for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, 1)) > 1:
            raise UnsupportedError(
                f"launched by horovodrun or mpirun ({name}={os.environ[name]}), but this API runs over torch.distributed, "
                "which needs torchrun's environment variables; launch with torchrun, or use horovod.torch"
            )
    return False


def _connect() -> None:
    """init_process_group from the environment, under a prefix of its own: torchrun's store outlives a shutdown() and a restart of the
    ranks, and the addresses of the previous group in it would be taken for those of the new one."""
    store, rank, size = next(dist.rendezvous("env://"))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"grace_ext/{life}/{next(_generations)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout()))


def _places(rank: int, size: int, connected: bool) -> tuple[int, int, int, int]:
    """local_rank, local_size, cross_rank, cross_size, from what the ranks say of their node and their place on it."""
    mine = (os.environ.get("GROUP_RANK") or socket.gethostname(), (int(os.environ.get("LOCAL_RANK", rank)), rank))
    everyone: list[Any] = [mine] * size
    if connected:
        dist.all_gather_object(everyone, mine)
    nodes: dict[str, list[tuple[int, int]]] = {}
    for node, place in everyone:
        nodes.setdefault(node, []).append(place)
    on_node = sorted(nodes[mine[0]])
    local_rank = on_node.index(mine[1])
    peers = [node for node, places in nodes.items() if len(places) > local_rank]
    return local_rank, len(on_node), peers.index(mine[0]), len(peers)


def shutdown() -> None:
    """Leaves the job; ends the process group if init() made it. Runs at exit too, and does nothing the second time."""
    global _world
    if _world is None:
        return
    for process_set in list(_world.sets.values()):
        remove_process_set(process_set)
    if _world.owned and dist.is_initialized():
        dist.destroy_process_group()
    global_process_set.ranks, global_process_set._group = [], None
    _world = None
    atexit.unregister(shutdown)


def is_initialized() -> bool:
    """Whether init() was called (and shutdown() was not)."""
    return _world is not None


def size() -> int:
    """How many ranks the job has."""
    return _current().size


def rank() -> int:
    """This process's rank in the job."""
    return _current().rank


def local_size() -> int:
    """How many ranks of the job are on this node."""
    return _current().local_size


def local_rank() -> int:
    """This process's place among the ranks on its node."""
    return _current().local_rank


def cross_size() -> int:
    """How many nodes have a rank with this local_rank()."""
    return _current().cross_size


def cross_rank() -> int:
    """The place of this node among the nodes that have a rank with this local_rank()."""
    return _current().cross_rank


def add_process_set(process_set: ProcessSet | Iterable[int]) -> ProcessSet:
    """Registers a process set; all ranks of the job must call this, in the same order.

    ValueError if those ranks have one already.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    world = _current()
    if any(known.ranks == process_set.ranks for known in world.sets.values()):
        raise ValueError(f"there is a process set of those ranks already: {process_set}")
    if len(set(process_set.ranks)) != len(process_set.ranks) or not set(process_set.ranks) <= set(range(world.size)):
        raise ValueError(f"{process_set} needs distinct ranks of 0..{world.size - 1}")
    if world.connected:
        process_set._group = dist.new_group(process_set.ranks)
    process_set.process_set_id = next(world.set_ids)
    world.sets[process_set.process_set_id] = process_set
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Unregisters a process set; all ranks must call this. False for the global set and for one that is not registered."""
    world = _current()
    if process_set.process_set_id == 0 or world.sets.get(process_set.process_set_id) is not process_set:
        return False
    if world.connected and process_set.included() and dist.is_initialized():
        dist.destroy_process_group(process_set._group)
    del world.sets[process_set.process_set_id]
    process_set.process_set_id = process_set._group = None
    return True


def _unsupported(what: str, why: str) -> NoReturn:
    raise UnsupportedError(f"{what} is not available over torch.distributed: {why}; launch with horovodrun to use it")


class _Elastic:
    """Stands for horovod.torch.elastic: importable, but using anything of it raises."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own protocols (copy, inspect) probe for these
            raise AttributeError(name)
        _unsupported(f"hvd.elastic.{name}", "its jobs cannot gain or lose ranks (torchrun --max-restarts restarts them)")


elastic = _Elastic()


def join(device: int = -1) -> NoReturn:
    """Raises UnsupportedError: torch.distributed has no join."""
    _unsupported("hvd.join()", "ranks that have run out of data cannot stand in with zeros; give every rank as many batches")


def start_timeline(file_path: str, mark_cycles: bool = False) -> NoReturn:
    """Raises UnsupportedError: torch.distributed writes no Horovod timeline."""
    _unsupported("hvd.start_timeline()", _NO_TIMELINE)


def stop_timeline() -> NoReturn:
    """Raises UnsupportedError: torch.distributed writes no Horovod timeline."""
    _unsupported("hvd.stop_timeline()", _NO_TIMELINE)
