"""Start and end of a job, ranks and sizes, process sets, and the names that torch.distributed has no counterpart for."""

from __future__ import annotations

import atexit
import datetime
import functools
import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ....errors import Afterwards, UnsupportedError
from ...timeouts import timeout
from .channel import Channel
from .groups import HorovodInternalError as HorovodInternalError

#: Seconds that Gloo's threads get to release tensors.
LET_GO = 0.05
_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_TIMELINE = "timelines are written by Horovod's core (torch.profiler can record collectives)"
_NOT_INITIALIZED = "not initialized; call hvd.init() first"


@dataclass
class _World:
    """This rank's place in the job. `connected`: whether there is a process group; `owned`: whether init() made it, so that shutdown()
    ends it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    connected: bool
    owned: bool
    sets: dict[int, ProcessSet] = field(default_factory=dict)
    set_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))


_world: _World | None = None
_generations = itertools.count()


def _current() -> _World:
    if _world is None:
        raise ValueError(_NOT_INITIALIZED)
    return _world


class ProcessSet:
    """Some of the ranks, to run collectives among them. It can be used once init(process_sets=...) or add_process_set() has registered
    it."""

    process_set_id: int | None = None
    mpi_comm = None

    def __init__(self, ranks_or_comm: Iterable[int]):
        if not isinstance(ranks_or_comm, Iterable):
            raise UnsupportedError(
                "a ProcessSet cannot be made from an MPI communicator, which torch.distributed does not know; "
                "give a list of ranks, or launch with horovodrun"
            )
        self.ranks = sorted(ranks_or_comm)
        if any(not isinstance(r, int) for r in self.ranks):
            raise ValueError(f"a ProcessSet is a list of ranks (ints), not {self.ranks}")
        self._channel: Channel | None = None

    def size(self) -> int | None:
        """Returns how many ranks are in the set; None if the set is not registered."""
        return None if self.process_set_id is None else len(_registered(self).ranks)

    def rank(self) -> int | None:
        """Returns this process's position in the set; None if the set is not registered. Raises ValueError if this rank is not in it."""
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
    sets, number = _current().sets, process_set.process_set_id
    if number is None or sets.get(number) is not process_set:
        raise ValueError(f"{process_set} is not registered: pass it to hvd.init(process_sets=[...]) or hvd.add_process_set()")
    return process_set


def channel_of(process_set: ProcessSet) -> Channel:
    """Returns the channel of that set. Raises ValueError if the set is not registered, or this rank is not in it."""
    _registered(process_set).rank()
    assert process_set._channel is not None  # a registered set has one on each of its ranks
    return process_set._channel


def group_of(process_set: ProcessSet) -> dist.ProcessGroup | None:
    """Returns the process group of that set's own collectives; None if this process is the whole job."""
    return channel_of(process_set).groups.data


@functools.cache
def let_go_at_exit() -> None:
    """Makes the process wait for LET_GO seconds at exit, for processes that run collectives of torch.distributed. Gloo's threads hold the
    tensors of the last collective a moment longer than its result, and a thread that releases them after the interpreter has ended aborts
    the process ("terminate called without an active exception")."""
    atexit.register(time.sleep, LET_GO)


def init(comm: Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Joins the job: an existing process group, else the job of torchrun's environment variables, else this process alone.

    comm: None, or a list of all ranks. A list of only some of them raises UnsupportedError.
    process_sets: process sets to register; "dynamic" is accepted and registers none.
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
    global_process_set.ranks = list(range(size))
    channel = Channel.connect("process set 0", global_process_set.ranks, rank, size, connected)
    global_process_set._channel = channel
    _world = _World(rank, size, *_places(rank, size, channel), connected=connected, owned=owned)
    _world.sets[0] = global_process_set
    atexit.register(shutdown)
    if comm is not None and list(comm) not in ([], global_process_set.ranks):
        with Afterwards(shutdown):
            raise UnsupportedError(
                f"init(comm={comm!r}): torch.distributed has one job of all {size} ranks; "
                "use a ProcessSet for some of them, or launch with horovodrun"
            )
    for process_set in () if process_sets is None or isinstance(process_sets, str) else process_sets:
        add_process_set(process_set)


def _launched() -> bool:
    """Whether the environment describes a job. Raises an error if it describes half of one, whose ranks would silently train apart."""
    missing = [name for name in _LAUNCH if name not in os.environ]
    if not missing:
        return True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set; launch with torchrun")
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ:
        raise UnsupportedError(
            f"srun started {os.environ['SLURM_NTASKS']} tasks, but {', '.join(missing)} is not set, so each would train alone; let srun "
            "start one torchrun per node (docs/multinode.md), or set these variables"
        )
    for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name, 1)) > 1:
            raise UnsupportedError(
                f"launched by horovodrun or mpirun ({name}={os.environ[name]}), but this API runs over torch.distributed, "
                "which needs torchrun's environment variables; launch with torchrun, or use horovod.torch"
            )
    return False


def _connect() -> None:
    """Calls init_process_group by the environment, under a store prefix of its own: torchrun's store outlives a shutdown() and a restart
    of the ranks, and the previous group's addresses in it would be mistaken for those of the new group."""
    store, rank, size = next(dist.rendezvous("env://"))
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"grace_ext/{life}/{next(_generations)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout()))


def _places(rank: int, size: int, channel: Channel | None) -> tuple[int, int, int, int]:
    """Returns (local_rank, local_size, cross_rank, cross_size). Every rank tells all others its node and its place on it."""
    mine = (os.environ.get("GROUP_RANK") or socket.gethostname(), (int(os.environ.get("LOCAL_RANK", rank)), rank))
    everyone: list[Any] = [mine] * size
    if channel is not None and channel.groups.control is not None:
        dist.all_gather_object(everyone, mine, channel.groups.control)
    nodes: dict[str, list[tuple[int, int]]] = {}
    for node, place in everyone:
        nodes.setdefault(node, []).append(place)
    on_node = sorted(nodes[mine[0]])
    local_rank = on_node.index(mine[1])
    peers = [node for node, places in nodes.items() if len(places) > local_rank]
    return local_rank, len(on_node), peers.index(mine[0]), len(peers)


def shutdown() -> None:
    """Leaves the job; ends the process group if init() made it. It also runs at exit, and does nothing the second time."""
    global _world
    if _world is None:
        return
    for process_set in _world.sets.values():
        _close(process_set)
    global_process_set.ranks, global_process_set.process_set_id = [], 0
    if _world.owned and dist.is_initialized():
        dist.destroy_process_group()
    _world = None
    atexit.unregister(shutdown)


def is_initialized() -> bool:
    """Whether init() was called (and shutdown() was not)."""
    return _world is not None


def size() -> int:
    """Returns how many ranks the job has."""
    return _current().size


def rank() -> int:
    """Returns this process's rank in the job."""
    return _current().rank


def local_size() -> int:
    """Returns how many ranks of the job are on this node."""
    return _current().local_size


def local_rank() -> int:
    """Returns this process's place among the ranks on its node."""
    return _current().local_rank


def cross_size() -> int:
    """Returns how many nodes have a rank with this local_rank()."""
    return _current().cross_size


def cross_rank() -> int:
    """Returns the place of this node among the nodes that have a rank with this local_rank()."""
    return _current().cross_rank


def add_process_set(process_set: ProcessSet | Iterable[int]) -> ProcessSet:
    """Registers a process set and returns it. All ranks of the job must call this, in the same order.

    Raises ValueError if these ranks have a process set already, or are not distinct ranks of the job; HorovodInternalError if the ranks of
    the job name different sets.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    world = _current()
    channel_of(global_process_set).compare("add_process_set", ranks=tuple(process_set.ranks))
    if any(known.ranks == process_set.ranks for known in world.sets.values()):
        raise ValueError(f"these ranks have a process set already: {process_set}")
    if len(set(process_set.ranks)) != len(process_set.ranks) or not set(process_set.ranks) <= set(range(world.size)):
        raise ValueError(f"{process_set} must have distinct ranks from 0 to {world.size - 1}")
    number = next(world.set_ids)
    process_set._channel = Channel.connect(f"process set {number}", process_set.ranks, world.rank, world.size, world.connected)
    process_set.process_set_id = number
    world.sets[number] = process_set
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Unregisters a process set; all ranks must call this. Returns False for the global set and for one that is not registered."""
    world, number = _current(), process_set.process_set_id
    if not number or world.sets.get(number) is not process_set:  # 0 is the global set, None is not registered
        return False
    channel_of(global_process_set).compare("remove_process_set", ranks=tuple(process_set.ranks))
    del world.sets[number]
    _close(process_set)
    return True


def _close(process_set: ProcessSet) -> None:
    if process_set._channel is not None:
        process_set._channel.close()
    process_set.process_set_id = process_set._channel = None


def _unsupported(what: str, why: str) -> NoReturn:
    raise UnsupportedError(f"{what} is not available over torch.distributed: {why}; launch with horovodrun to use it")


class _Elastic:
    """Stands for horovod.torch.elastic: it can be imported, but every use of it raises UnsupportedError."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own protocols (copy, inspect) probe for these
            raise AttributeError(name)
        _unsupported(f"hvd.elastic.{name}", "its jobs cannot gain or lose ranks (torchrun --max-restarts restarts them)")


elastic: Any = _Elastic()


# The three names below have Horovod's return types: type checkers take code after a NoReturn for unreachable, and under Horovod it is not.
def join(device: int = -1) -> int:
    """Raises UnsupportedError: torch.distributed has no join. Ranks that wait for this one get HorovodInternalError with the reason."""
    why = "a rank that has run out of data cannot take part with zeros; give every rank equally many batches"
    if _current().size > 1:
        channel_of(global_process_set).groups.break_off(f"Rank {rank()} has called hvd.join(): {why}")
    _unsupported("hvd.join()", why)


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Raises UnsupportedError: torch.distributed writes no Horovod timeline."""
    _unsupported("hvd.start_timeline()", _NO_TIMELINE)


def stop_timeline() -> None:
    """Raises UnsupportedError: torch.distributed writes no Horovod timeline."""
    _unsupported("hvd.stop_timeline()", _NO_TIMELINE)
