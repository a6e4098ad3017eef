"""The transports of torch: for a world of one rank, for Horovod, and for torch.distributed."""

from __future__ import annotations

import contextlib
import datetime
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...errors import UnsupportedError
from ...exchange.effects import Collective
from ...exchange.transport import Transport, arriving, by_sum, cut, gathered, to_sum
from ..horovod import failure_of, process_set_of
from ..timeouts import patience, timeout
from .dist.groups import backends_of
from .dist.world import HorovodInternalError, let_go_at_exit
from .ops import HostOps, TorchOps

DeviceOps = HostOps | TorchOps


class SingleTransport(Transport):
    """A world of one rank: every collective returns its input."""

    ops: DeviceOps
    rank, size, gathers_uneven, scatters_uneven, splits = 0, 1, True, True, True

    def __init__(self, ops: DeviceOps):
        self.ops = ops

    def group(self, ranks: Sequence[int]) -> SingleTransport:
        return self

    def start(self, collective: Collective, name: str) -> Any:
        return collective

    def wait(self, handle: Collective) -> Any:
        return handle.array / handle.divisor if handle.kind == "allreduce" else [handle.array]


class HorovodTransport(Transport):
    """Horovod's named collectives. Its all-gather takes arrays of different lengths and returns one concatenation."""

    ops: DeviceOps
    gathers_uneven = True
    scatters_uneven = True
    splits = True

    def __init__(self, ops: DeviceOps, hvd: Any, process_set: Any):
        self.ops, self.hvd, self.process_set = ops, hvd, process_set
        self.failure = failure_of(hvd.HorovodInternalError)
        self.rank, self.size = process_set.rank(), process_set.size()

    def start(self, collective: Collective, name: str) -> Any:
        tensor, hvd, among = self.ops.as_torch(collective.array), self.hvd, self.process_set
        if collective.kind == "allreduce":
            # With Average the engine divides, as it does for dense gradients: this gives the same bits as plain Horovod.
            op = hvd.Average if collective.divisor == self.size else hvd.Sum
            return collective, [hvd.allreduce_async_(tensor, name=name, op=op, process_set=among)], None  # in place: the array is ours
        if collective.kind == "allgather":
            summand = to_sum(self, collective)
            if summand is not None:
                words = _words(self.ops.as_torch(summand))
                return collective, [hvd.allreduce_async(words, name=name, op=hvd.Sum, process_set=among)], words
            return collective, [hvd.allgather_async(tensor, name=name, process_set=among)], None
        if collective.kind == "alltoall":
            splits = torch.tensor(collective.sizes, dtype=torch.int32)
            return collective, [hvd.alltoall_async(tensor, splits=splits, name=name, process_set=among)], None
        return collective, self._broadcasts(collective, tensor, name), None

    def group(self, ranks: Sequence[int]) -> HorovodTransport | SingleTransport | None:
        mine = self.rank in ranks
        if len(ranks) == 1:
            return SingleTransport(self.ops) if mine else None
        made = process_set_of(self.hvd, ranks, self.size)
        return HorovodTransport(self.ops, self.hvd, made) if mine else None

    def _broadcasts(self, collective: Collective, tensor: torch.Tensor, name: str) -> list[Any]:
        assert collective.sizes is not None
        handles = []
        for rank, length in enumerate(collective.sizes):
            data = tensor if rank == self.rank else tensor.new_empty(length)
            if not length:
                handles.append(data)
                continue
            root = self.process_set.ranks[rank] if self.process_set.ranks else rank  # Horovod expects the rank in the whole job
            handles.append(self.hvd.broadcast_async(data, root_rank=root, name=f"{name}/{rank}", process_set=self.process_set))
        return handles

    def wait(self, handle: Any) -> Any:
        collective, handles, words = handle  # words: this rank's summand, if a sum replaces the gather
        results = [h if isinstance(h, torch.Tensor) else self._finished(h) for h in handles]
        if collective.kind == "allreduce":
            total = self.ops.from_torch(results[0])
            return total if collective.divisor in (1, self.size) else total / collective.divisor
        if collective.kind == "broadcast":
            return [self.ops.from_torch(data) for data in results]
        if collective.kind == "alltoall":
            data, received = results[0]
            return cut(self.ops.from_torch(data), received.tolist())
        if words is not None:
            return by_sum(self, collective, self.ops.from_torch(_less(results[0], words)))
        return gathered(self, collective, self.ops.from_torch(results[0]))

    def _finished(self, handle: int) -> Any:
        """Waits for a handle, as Horovod's `synchronize` does, but with a time limit. Horovod polls once per millisecond, for ever: an
        operation that is started just as a peer's death ends Horovod's own thread never ends. This polls more often at first, and raises
        RuntimeError a little after GRACE_EXT_TIMEOUT."""
        began = time.monotonic()
        while not self.hvd.poll(handle):
            waited = time.monotonic() - began
            if waited > patience():
                raise RuntimeError(f"Horovod has not finished this collective in {waited:.0f} s")
            time.sleep(min(1e-3, 5e-5 + waited / 10))
        return self.hvd.synchronize(handle)


# Process groups whose transports are gone; each has threads and sockets.
_orphans: list[dist.ProcessGroup] = []


def transport_of_its_own(ops: DeviceOps, group: dist.ProcessGroup | None) -> DistTransport:
    """Returns a transport over a new process group of the same ranks, if these are all ranks of the job, which must all call it; else over
    the group itself.

    Torch.distributed pairs collectives by their order in a group, so whatever else the job exchanges (metrics, barriers, another optimizer)
    must not come between those of one driver. (Torch has no way to make a group that only its members call and all name alike.)"""
    if dist.get_world_size(group) < dist.get_world_size():
        return DistTransport(ops, group)
    return _over_new_groups(ops, [tuple(range(dist.get_world_size()))])[0]


def transports_among(ops: DeviceOps, *groups: Sequence[int]) -> list[DistTransport | SingleTransport]:
    """Returns a transport over a new process group for each of these lists of ranks of the job, all with this rank. Every rank of the job
    must call it, because all make the groups of all; not all need ask for as many."""
    every: list[Any] = [None] * dist.get_world_size()
    wanted = [tuple(ranks) for ranks in groups if len(ranks) > 1]
    dist.all_gather_object(every, wanted)
    made = dict(zip(wanted, _over_new_groups(ops, wanted, sorted({ranks for its in every for ranks in its})), strict=True))
    return [made.get(tuple(ranks)) or SingleTransport(ops) for ranks in groups]


def _over_new_groups(
    ops: DeviceOps, wanted: Sequence[tuple[int, ...]], of_all: Sequence[tuple[int, ...]] | None = None
) -> list[DistTransport]:
    """Makes the process groups `of_all`, as every rank must, and returns transports over those that are wanted on this rank."""
    made = {ranks: dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout())) for ranks in of_all or wanted}
    while _orphans:  # all ranks have come here, so none uses an earlier group whose optimizer is gone
        with contextlib.suppress(ValueError):  # hvd.shutdown() has destroyed it, with all others
            dist.destroy_process_group(_orphans.pop())
    transports = [DistTransport(ops, made[ranks]) for ranks in wanted]
    for transport, ranks in zip(transports, wanted, strict=True):
        weakref.finalize(transport, _orphans.append, made[ranks])
    return transports


class DistTransport(Transport):
    """torch.distributed's collectives of one process group, matched by the order in which they start."""

    ops: DeviceOps
    splits = True
    failure = failure_of(HorovodInternalError)

    def __init__(self, ops: DeviceOps, group: Any = None):
        self.ops, self._group = ops, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.by_gloo = backends_of(group).get(ops.device.type) == dist.Backend.GLOO
        let_go_at_exit()

    def group(self, ranks: Sequence[int]) -> DistTransport | SingleTransport | None:
        mine = self.rank in ranks
        if len(ranks) == 1:
            return SingleTransport(self.ops) if mine else None
        if self.size != dist.get_world_size():
            raise UnsupportedError("'hierarchical' works among all ranks of the job; leave the process set or group out")
        made = dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout()))
        return DistTransport(self.ops, made) if mine else None

    def start(self, collective: Collective, name: str) -> Any:
        tensor = self.ops.as_torch(collective.array)
        if collective.kind == "allreduce":
            return collective, tensor, [dist.all_reduce(tensor, group=self._group, async_op=True)], None
        if collective.kind == "alltoall":
            assert collective.sizes is not None
            mine = arriving(collective, self.rank)
            out = tensor.new_empty(sum(mine))
            work = dist.all_to_all_single(out, tensor, mine, list(collective.sizes), group=self._group, async_op=True)
            return collective, list(out.split(mine)), [work], None
        assert collective.sizes is not None
        summand = to_sum(self, collective) if self.by_gloo else None
        if summand is not None:
            words = _words(self.ops.as_torch(summand))
            total = words.clone()
            return collective, total, [dist.all_reduce(total, group=self._group, async_op=True)], words
        outs = [tensor.new_empty(length) for length in collective.sizes]
        if collective.kind == "allgather":
            return collective, outs, [dist.all_gather(outs, tensor, group=self._group, async_op=True)], None
        outs[self.rank] = tensor
        roots = [r if self._group is None else dist.get_global_rank(self._group, r) for r in range(self.size)]
        pairs = [(out, root) for out, root in zip(outs, roots, strict=True) if len(out)]
        return collective, outs, [dist.broadcast(out, src=root, group=self._group, async_op=True) for out, root in pairs], None

    def wait(self, handle: Any) -> Any:
        collective, result, works, words = handle  # words: as in HorovodTransport
        for work in works:
            work.wait()
        if collective.kind == "allreduce":
            return self.ops.from_torch(result) / collective.divisor
        if words is not None:
            return by_sum(self, collective, self.ops.from_torch(_less(result, words)))
        return [self.ops.from_torch(data) for data in result]


def _words(data: torch.Tensor) -> torch.Tensor:
    """Returns the bytes as int32[], copied if they are not aligned to 4 bytes."""
    return data.view(torch.int32) if data.data_ptr() % 4 == 0 else data.clone().view(torch.int32)


def _less(total: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of total - own, both int32[], computed in place."""
    return total.sub_(own).view(torch.uint8)
