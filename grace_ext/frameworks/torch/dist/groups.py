"""The process groups of one process set, by which its ranks compare what they have started and wait for what they have launched."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ....errors import GraceError
from ...timeouts import timeout
from .deadlock import SLOTS, DeadlockFinder
from .signature import Signature, Started, digest, first_difference

#: One collective in EVERY is compared although its signature is known. DeadlockFinder keeps notes of as many.
EVERY = SLOTS
#: Seconds that a rank waits before it notes what it has started, and looks what the others have.
LOOK = 1.0
#: Seconds of waiting after which a rank logs a warning that says what it waits for.
SLOW = 60.0
#: Seconds that a rank waits at most for the others before it closes its connections.
PARTING = 1.0
#: How many signatures are remembered at most; then all count as new again, on all ranks alike.
KNOWN = 10_000
LOG = logging.getLogger("grace_ext")


class HorovodInternalError(GraceError, RuntimeError):
    """A collective failed: the ranks started different ones, a peer died, or a rank did not come in time."""


class Groups:
    """One rank's view of three process groups of the same ranks.

    data, control: the groups for data and for comparisons; None if this process is the whole job. The third is for barriers.
    broken: why nothing can be launched here any more (only some of the ranks have launched a collective), or ''."""

    def __init__(self, label: str, ranks: Sequence[int], rank: int, advice: str, groups: Sequence[dist.ProcessGroup] = ()):
        self._label, self._ranks, self._rank, self._advice, self._groups = label, ranks, rank, advice, groups
        self.data: Any
        self.control: Any
        self._barriers: Any
        self.data, self.control, self._barriers = groups or (None, None, None)
        self._backends: dict[str, str] = {}
        self._store: dist.Store | None = None
        self._deadlocks: DeadlockFinder | None = None
        if groups:
            self._backends = backends_of(self.data)
            store = _job_store()
            if store is not None:
                self._store = dist.PrefixStore(f"grace_ext/{self.control.group_name}", store)
                self._deadlocks = DeadlockFinder(self._store, label, rank)
        self._number = 0  # of the latest collective
        self._known: dict[Signature, bytes] = {}
        self._latest: deque[Started] = deque(maxlen=EVERY)
        self._history = self._before = bytes(16)
        self.broken = ""
        self._abandoned = self._closed = False

    @classmethod
    def connect(cls, label: str, ranks: Sequence[int], rank: int, advice: str) -> Groups | None:
        """Makes the groups. All ranks of the job must call it; those that are not in `ranks` get None."""
        limit, host = datetime.timedelta(seconds=timeout()), "gloo" if _job_store() else None
        groups = [dist.new_group(list(ranks), timeout=limit, backend=backend) for backend in (None, host, host)]
        return cls(label, ranks, rank, advice, groups) if rank in ranks else None

    # --- comparing -----------------------------------------------------------------------------------------------------
    def is_due(self, signature: Signature, values: Sequence[int]) -> bool:
        """Whether the ranks must compare this collective before they launch it, if it is the next."""
        return len(self._ranks) > 1 and (bool(values) or signature not in self._known or (self._number + 1) % EVERY == 0)

    def admit(self, signature: Signature, values: Sequence[int]) -> Sequence[Sequence[int]]:
        """Compares the next collective among the ranks if that is due. Returns, for each of these values, those of all ranks."""
        self._check_usable()
        is_due, known = self.is_due(signature, values), self._known.get(signature) or signature.digest()
        self._number += 1
        self._latest.append(Started(self._number, signature, is_due))
        self._before, self._history = self._history, digest(self._history + struct.pack("<q", self._number) + known)
        if not is_due:
            return [[value] for value in values]
        # Every comparison starts with three numbers: gathers of different lengths must not meet.
        value, *more = values or [0]
        one, other, *of_all = zip(*self._gathered([*struct.unpack("<2q", self._history), value], signature), strict=True)
        self.check_alike(list(zip(one, other, strict=True)))
        if len(self._known) == KNOWN:
            self._known.clear()
        self._known[signature] = known
        return of_all + list(zip(*self._gathered(more, signature), strict=True)) if more else of_all

    def token(self) -> int:
        """Returns a number that is the same on all ranks that have started the same collectives so far."""
        return struct.unpack_from("<q", self._history)[0]

    def check_alike(self, tokens: Sequence[object]) -> None:
        """Raises HorovodInternalError if the tokens of all ranks differ. All ranks call it with the same tokens, before they launch any
        data of the present collective. If only this one differs, they can go on with the next."""
        if len(set(tokens)) == 1:
            return
        everyone: list[Any] = [None] * len(self._ranks)
        with self._failures("the exchange of what the ranks have started"):
            dist.all_gather_object(everyone, list(self._latest), self.control)
        number, text = first_difference(everyone, self._ranks, self._label)
        if all(latest[-1].number == number for latest in everyone):
            self._history = digest(self._before + b"the ranks differed here")
            self._latest.pop()
            raise HorovodInternalError(text)
        self.broken = f"{text}. {self._advice}"
        self._check_usable()

    def _gathered(self, numbers: Sequence[int], signature: Signature) -> list[list[int]]:
        mine = torch.tensor(numbers)
        everyone = [torch.empty_like(mine) for _ in self._ranks]
        self.wait([dist.all_gather(everyone, mine, self.control, async_op=True)], signature)
        return [row.tolist() for row in everyone]

    def _check_usable(self) -> None:
        if self.broken:
            raise HorovodInternalError(self.broken)
        if self._closed:
            raise HorovodInternalError(f"hvd.shutdown() or remove_process_set() has ended {self._label} before this collective was done")

    # --- waiting -------------------------------------------------------------------------------------------------------
    def wait(self, works: Sequence[dist.Work], what: object, *devices: str) -> None:
        """Waits until the works, for tensors on these devices, are done. Raises HorovodInternalError if one of them failed, or if the ranks
        wait for different collectives."""
        # Gloo's works alone can be waited for a while: NCCL's only make a stream wait, and a time limit would end their communicator.
        by_gloo = all(self._backends.get(device, "gloo") == "gloo" for device in devices)
        began, logged = time.monotonic(), False
        with self._failures(what, works):
            for work in works:
                while by_gloo and not _ended(work):
                    self._look()
                    if not logged and time.monotonic() - began > SLOW:
                        LOG.warning("rank %d has waited for the other ranks for %.0f s in %s of %s", self._rank, SLOW, what, self._label)
                        logged = True
                work.wait()

    @contextlib.contextmanager
    def _failures(self, what: object, works: Sequence[dist.Work] = ()) -> Iterator[None]:
        """Turns errors of torch.distributed into HorovodInternalError, and remembers that a work may be under way still."""
        try:
            yield
        except BaseException as error:
            self._abandoned |= not all(work.is_completed() for work in works)
            if isinstance(error, RuntimeError) and not isinstance(error, HorovodInternalError):
                raise HorovodInternalError(f"rank {self._rank}: {what} of {self._label} failed: {error}") from error
            raise

    def _look(self) -> None:
        """Notes what this rank has started. Raises HorovodInternalError if the ranks wait in different collectives."""
        self._check_usable()
        if self._deadlocks is not None:
            self.broken = self.broken or self._deadlocks.look(list(self._latest), self._advice)
        self._check_usable()

    def break_off(self, why: str) -> None:
        """Makes this rank's next collective use new groups, if it can, and whatever other ranks wait for raise HorovodInternalError."""
        self.broken = f"{why}. {self._advice}"
        if self._deadlocks is not None:
            self._deadlocks.tell(self.broken)

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        self._check_usable()
        if self._groups:
            self.wait([dist.barrier(self._barriers, async_op=True)], "barrier")

    # --- the end -------------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Makes whoever waits raise HorovodInternalError soon."""
        self._closed = True

    def part(self) -> None:
        """Waits for the other ranks to call it, but not for long: a peer that closes its connections just after a collective makes it fail
        on a rank that has not seen its end yet."""
        if self._store is None or self.broken:
            return
        with contextlib.suppress(RuntimeError):  # the process that serves the store may have ended
            here, until = self._store.add("parting", 1), time.monotonic() + PARTING
            while here < len(self._ranks) and time.monotonic() < until:
                time.sleep(0.01)
                here = self._store.add("parting", 0)

    def close(self, under_way: bool) -> None:
        """Ends the groups, without waiting for other ranks. under_way: some of their collectives may never be done."""
        self._closed = True
        groups, self._groups = self._groups, ()
        for group in groups if dist.is_initialized() else ():
            if under_way or self._abandoned or self.broken:
                # The destructor of a Gloo group waits until its collectives are done, and a rank that ends by an error could not end before
                # its peers do. So these groups are never destroyed.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
            with contextlib.suppress(ValueError):  # the user has ended all groups, and perhaps made new ones
                dist.destroy_process_group(group)


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Returns a process group's backends by device type."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def _ended(work: dist.Work) -> bool:
    """Waits for at most LOOK seconds. Returns whether the work has ended, well or not."""
    with contextlib.suppress(RuntimeError):
        work.wait(datetime.timedelta(seconds=LOOK))
    return work.is_completed()


def _job_store() -> dist.Store | None:
    """Returns the store of the default process group; MPI's has none. There is no public way to that of a group that the user has made."""
    return dist.distributed_c10d._get_default_store()
