"""Launches the collectives of one process set in the order in which they were started, and compares what the ranks have started.

torch.distributed pairs the collectives of a process group by nothing but their order. Ranks that start different ones get wrong numbers,
wait for each other, or abort. So:

1. The ranks compare a collective's Signature (kind, name, options, and each tensor's dtype, shape and device) if it is new: one gather of
   three numbers per rank, before anything is launched. If the ranks differ, all of them raise the same error and may go on.
2. A collective whose signature was compared before is launched at once. All ranks know the same signatures, because all of them took part
   in every comparison. One collective in EVERY is compared although it is known, and so are those that exchange sizes anyway. The numbers
   compared are a digest of all collectives so far, so a comparison also finds known collectives that have met in wrong pairs.
3. If a rank starts a known collective, and another rank a new one instead, they wait for each other in different places. A rank that has
   waited for LOOK seconds notes in the job's store what it has started; a rank that finds something else there under the same number
   writes an error into the store, and every rank that waits raises it. Collectives are under way then that their peers will never launch,
   so the next one is launched in new process groups. Only all ranks of the job can make these: other process sets must be added again.
   A rank that waits for NCCL leaves no notes, so there only NCCL's own timeout ends such a wait.
4. Collectives are launched in the order of their starts, whichever threads make them. Those that wait for a comparison, and those behind
   them, are in a queue. It is emptied by the thread that waits for a result or, for handles, by a helper thread: starting a collective
   never waits for other ranks. Only the thread that holds `_launching` takes from the queue and launches.
5. Comparisons, data and barriers have a process group each, so that none of them pairs with another, or with collectives of the user.

A Channel does 4; its Groups (groups.py) do 1, 2 and 5; a DeadlockFinder (deadlock.py) does 3.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .groups import LOOK, Groups
from .signature import Signature, TensorSignature

RENEWED = "The next collective is launched in new process groups, so the job can go on"
UNUSABLE = "This process set cannot be used any more: remove it and add it again, on all ranks of the job"


@dataclass
class Piece:
    """One tensor's part of a collective. `launch(groups, values)` starts it; it returns works, and a function that returns the result once
    they are done. If `value` is a number, the ranks exchange theirs first: `values` are those of all ranks, in rank order. `stream` is the
    CUDA stream to launch it on: another thread has another current stream."""

    signature: TensorSignature | None
    launch: Callable[[Groups, Sequence[int]], tuple[list[dist.Work], Callable[[], Any]]]
    value: int | None = None
    stream: Any = None


class Collective:
    """A collective that was started. Its result is a tuple of the results of its pieces."""

    def __init__(self, channel: Channel, kind: str, name: str | None, options: dict[str, Any], pieces: Sequence[Piece]):
        tensors = tuple(piece.signature for piece in pieces if piece.signature is not None)
        self.channel, self.signature = channel, Signature(kind, name, tuple(options.items()), tensors)
        self.key = (kind, name) if name else id(self)
        self.launched = False
        self.values = [piece.value for piece in pieces if piece.value is not None]
        self._pieces, self._groups = pieces, channel.groups
        self._works: list[dist.Work] = []
        self._finish: list[Callable[[], Any]] = []
        self._error: BaseException | None = None

    def launch(self, usable: Callable[[], Groups]) -> None:
        """Launches it, in any thread, over the groups that `usable` returns. An error is kept for `result`; a KeyboardInterrupt is raised
        here as well."""
        try:
            groups = self._groups = usable()
            values = iter(groups.admit(self.signature, self.values))
            for piece in self._pieces:
                of_all = () if piece.value is None else next(values)
                with torch.no_grad(), torch.cuda.stream(piece.stream) if piece.stream else contextlib.nullcontext():
                    works, finish = piece.launch(groups, of_all)
                self._works += works
                self._finish.append(finish)
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self.launched = True

    def done(self) -> bool:
        """Whether result() would not wait."""
        return self.launched and (self._error is not None or all(work.is_completed() for work in self._works))

    def result(self) -> tuple[Any, ...]:
        """Waits, then returns the result. Raises HorovodInternalError if the collective failed."""
        try:
            self.channel.launch(self)
            if self._error is not None:
                raise self._error
            self._groups.wait(self._works, self.signature, *{tensor.device for tensor in self.signature.tensors})
            with torch.no_grad():
                return tuple(finish() for finish in self._finish)
        finally:
            self.channel.forget(self)


class Channel:
    """The collectives of one process set, on one of its ranks. `whole`: whether it is all ranks of the job."""

    def __init__(self, label: str, ranks: Sequence[int], rank: int, whole: bool, groups: Groups):
        self._label, self._ranks, self._rank, self._whole = label, ranks, rank, whole
        self.groups = groups
        self._open: dict[Any, Collective] = {}
        self._queue: deque[Collective] = deque()
        self._starting = threading.Lock()  # guards _open, and who appends to _queue
        self._launching = threading.Lock()  # guards groups, and who takes from _queue
        self._helping = threading.Lock()  # guards _helper
        self._helper: threading.Thread | None = None

    @classmethod
    def connect(cls, label: str, ranks: Sequence[int], rank: int, size: int, connected: bool) -> Channel | None:
        """Makes the process groups, if this rank is connected to others. All ranks of the job must call it; those that are not in `ranks`
        get None."""
        whole = len(ranks) == size
        groups = Groups.connect(label, ranks, rank, RENEWED if whole else UNUSABLE) if connected else Groups(label, ranks, rank, "")
        return None if groups is None else cls(label, ranks, rank, whole, groups)

    def start(self, collective: Collective) -> Collective:
        """Puts a collective into the order, and launches it if there is nothing to wait for. Raises ValueError if its name is in use."""
        with self._starting:
            if collective.key in self._open:
                raise ValueError(
                    f"{collective.signature.kind} {collective.signature.name!r} was started before and is not synchronized yet; one "
                    "collective of a kind can use a name at a time: synchronize the earlier one first, or use another name"
                )
            self._open[collective.key] = collective
            self._queue.append(collective)
        if self._launching.acquire(blocking=False):
            try:
                while self._queue and not self._must_wait(self._queue[0]):
                    self._launch_next()
            finally:
                self._launching.release()
        return collective

    def _must_wait(self, collective: Collective) -> bool:
        return bool(self.groups.broken) or self.groups.is_due(collective.signature, collective.values)

    def launch(self, collective: Collective) -> None:
        """Launches a collective, and those before it, if they are not launched yet."""
        while not collective.launched:
            with self._launching:
                if not collective.launched:
                    self._launch_next()

    def _launch_next(self) -> None:
        self._queue.popleft().launch(self._usable)

    def _usable(self) -> Groups:
        """Returns the groups: new ones, if the old ones are broken and all ranks of the job are here."""
        if self.groups.broken and self._whole:
            self.groups.close(under_way=True)
            groups = Groups.connect(self._label, self._ranks, self._rank, RENEWED)
            assert groups is not None  # this rank is one of them
            self.groups = groups
        return self.groups

    def compare(self, kind: str, **options: Any) -> None:
        """Raises HorovodInternalError on all ranks if they do not call this alike."""
        self.start(Collective(self, kind, None, options, [Piece(None, lambda groups, values: ([], list), 0)])).result()

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        groups = self.groups
        if groups.broken:
            with self._launching:
                groups = self._usable()
        groups.barrier()

    def launch_in_background(self) -> None:
        """Has a helper thread launch what is in the queue."""
        with self._helping:
            if self._queue and self._helper is None:
                self._helper = threading.Thread(target=self._help, name=f"grace_ext {self._label}", daemon=True)
                self._helper.start()

    def _help(self) -> None:
        while True:
            with self._helping:
                if not self._queue:
                    self._helper = None
                    return
            with self._launching:
                if self._queue:
                    self._launch_next()

    def forget(self, collective: Collective) -> None:
        """Frees the name of a collective that has ended."""
        with self._starting:
            if self._open.get(collective.key) is collective:
                del self._open[collective.key]

    def close(self) -> None:
        """Ends the process groups. All ranks call it, but none of them waits long for the others."""
        self.groups.stop()
        helper = self._helper
        if helper is not None:
            helper.join(3 * LOOK)
        self.groups.part()
        self.groups.close(under_way=not all(collective.done() for collective in self._open.values()))
