"""Ends TensorFlow's waits for ranks that do not come, GRACE_EXT_TIMEOUT after they began.

TensorFlow cannot give up an operation of Horovod's, and Horovod waits for ever for a rank that is alive and does something else. So what
this rank waits for is written down here, and one thread looks at it once per second. When a wait has lasted too long, the thread logs which
collective it is and calls Horovod's shutdown(), with which all collectives of all ranks end in Horovod's own error. If that does not end
Horovod either (a rank that does not answer, under MPI), the thread ends this process, and the launcher ends the others.

A wait is only what a rank does between handing its data to a collective and getting the result with nothing else to do: not the time in
which a graph is made, the model is evaluated, or a backward pass runs beside a collective.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from ...errors import CollectiveError, GraceError
from ..horovod import failure_of
from ..timeouts import MARGIN, NAME, patience, timeout

LOG = logging.getLogger("grace_ext")
FAILURE = failure_of(HorovodInternalError)
#: Seconds between two looks.
TICK = 1.0
#: TensorFlow's folder, where a Python thread stands while it runs an operation or a graph.
TENSORFLOW = os.path.dirname(tf.__file__)


class Waiting:
    """One collective that this rank waits for. reason: why the watchdog has ended it, or ''."""

    def __init__(self, name: str, parameters: Sequence[str], rank: int, in_graph: bool):
        self.name, self.parameters, self.rank = name, parameters, rank
        self.since, self.seconds, self.reason = time.monotonic(), 0.0, ""
        # The calls of graphs that are under way. An error elsewhere in a graph ends it, and nobody tells us; but then its call is gone.
        frames = sys._current_frames().items() if in_graph else ()
        self._inside = [(thread, frame) for thread, frame in frames if frame.f_code.co_filename.startswith(TENSORFLOW)]

    def is_over(self) -> bool:
        """Whether all graphs that were under way when this began have ended."""
        now = sys._current_frames()
        return bool(self._inside) and not any(now.get(thread) is frame for thread, frame in self._inside)

    def error(self, said: str = "") -> CollectiveError:
        """Returns the error of this collective. said: what the engine says, for when the watchdog has not ended it."""
        return FAILURE(self.reason or said, self.name, self.parameters, self.rank)


class Watchdog:
    """Looks at the waits of this process. end: what ends all collectives. leave: what ends the process, if `end` does not return."""

    def __init__(self, end: Any, leave: Any):
        self._end, self._leave = end, leave
        self._waits: set[Waiting] = set()
        self._thread: threading.Thread | None = None
        self._ending = threading.Lock()  # held while Horovod is being shut down

    def begin(self, name: str, parameters: Sequence[str], rank: int, in_graph: bool) -> Waiting:
        """Writes down that this rank now waits for this collective, until `done`. in_graph: whether a graph makes the collective, after
        this; else its caller does, who calls `done` in any case."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="grace_ext watchdog", daemon=True)
            self._thread.start()
            atexit.register(self.settle)  # runs before Horovod's own shutdown at exit, which was registered earlier
        waiting = Waiting(name, parameters, rank, in_graph)
        self._waits.add(waiting)
        return waiting

    def done(self, waiting: Waiting | None) -> None:
        if waiting is not None:
            self._waits.discard(waiting)

    def settle(self) -> None:
        """Waits until a shutdown that is under way is over: two at once would abort the process."""
        with self._ending:
            pass

    def _look(self) -> None:
        now = time.monotonic()
        while True:
            time.sleep(min(TICK, patience() / 4))
            before, now = now, time.monotonic()
            for waiting in list(self._waits):
                # Time in which this process was stopped, or its machine asleep, does not count.
                waiting.seconds += min(now - max(before, waiting.since), 2 * TICK)
                if waiting.is_over():
                    self.done(waiting)
                elif waiting.seconds > patience():
                    self._give_up()
                    break

    def _give_up(self) -> None:
        with self._ending:
            for waiting in list(self._waits):
                waiting.reason = f"not every rank has come to it in {waiting.seconds:.0f} s ({NAME} is {timeout():g})"
                LOG.error("%s: %s. Horovod is shut down, so that no rank waits for ever", CollectiveError.__name__, waiting.error())
                self.done(waiting)
            ending = threading.Thread(target=self._end, name="grace_ext shutdown", daemon=True)
            ending.start()
            ending.join(MARGIN)
            if ending.is_alive():
                LOG.critical(
                    "Horovod has not ended in %g s either: it waits for a rank that does not answer, and MPI has no time limit for that. "
                    "This process ends now, so that the launcher ends the others",
                    MARGIN,
                )
                self._leave()


def shutdown() -> None:
    """Shuts Horovod down, as Horovod's function does, also while the watchdog does so."""
    WATCHDOG.settle()
    hvd.shutdown()


def leave() -> None:
    """Ends this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


WATCHDOG = Watchdog(lambda: hvd.shutdown(), leave)


@contextmanager
def watched(name: str, rank: int) -> Iterator[None]:
    """Watches a blocking collective. Raises RuntimeError with the reason if it did not complete."""
    waiting = WATCHDOG.begin(name, (), rank, in_graph=False)
    try:
        yield
    except (tf.errors.OpError, HorovodInternalError) as error:
        WATCHDOG.settle()  # elastic jobs shut Horovod down next
        raise RuntimeError(waiting.reason or str(error)) from error
    finally:
        WATCHDOG.done(waiting)


@contextmanager
def blocking(name: str, process_set: Any = hvd.global_process_set) -> Iterator[None]:
    """Watches a blocking collective that no driver makes, such as those of the callbacks. Raises CollectiveError if it did not complete."""
    rank = process_set.rank() if process_set.included() else hvd.rank()
    try:
        with watched(name, rank):
            yield
    except GraceError:
        raise
    except RuntimeError as error:
        raise FAILURE(str(error), name, (), rank) from error


def watched_operation(name: str, process_set: Any, value: Any, make: Callable[[Any], Any]) -> Any:
    """Returns make(value), a collective that no driver makes. It is watched in eager code and in graphs.

    value and the result: a tensor or IndexedSlices."""
    rank, running = process_set.rank(), list[Waiting]()
    if tf.executing_eagerly():
        with blocking(name, process_set):
            return make(value)

    def begin() -> np.bool_:
        end()  # an earlier one, whose graph ended by an error
        running.append(WATCHDOG.begin(name, (), rank, in_graph=True))
        return np.True_

    def end() -> np.bool_:
        while running:
            WATCHDOG.done(running.pop())
        return np.True_

    return _behind(end, make(_behind(begin, value)))


def _behind(function: Callable[[], np.bool_], value: Any) -> Any:
    """Returns the same value, for operations that run after this function, which is called when the value is there."""
    with tf.control_dependencies(tf.nest.flatten(value, expand_composites=True)):
        called = tf.numpy_function(function, [], tf.bool)
    with tf.control_dependencies([called]):
        return tf.nest.map_structure(tf.identity, value, expand_composites=True)
