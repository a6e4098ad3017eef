"""Records what one rank does in a step (work, collectives started and waited for) from the real driver, and replays it on any network.

`record` runs the real driver and codecs for one and for two simulated ranks, with the collectives as an engine carries them, and times
every stretch of work between two of the driver's effects. `Trace.on(n)` extrapolates this to n ranks: the work after a gather grows by the
time to decode one payload more, and a collective of a share of the whole shrinks as a + b/n. `replay` computes the time line: one thread
works, while one network carries the collectives in the order in which they were started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.compiled import host_ops
from ..arrays.numpy import NumpyOps
from ..composition.composition import Composition
from ..composition.grace import Grace
from ..driver.driver import Driver
from ..errors import UnsupportedError
from ..exchange.effects import Collective, Start
from ..exchange.lockstep import execute
from ..exchange.transport import Transport
from ..parts.ops import Ops
from ..parts.tensor import TensorSpec
from .shapes import Shapes, gradients, specs_of

#: (kind, ranks, bytes of one rank's buffer) -> seconds
Network = Callable[[str, int, float], float]
GATHERS = ("allgather", "broadcast", "alltoall")
#: If the first step takes more than this many seconds, one more is timed, instead of `steps`.
PATIENCE = 3.0


@dataclass(frozen=True)
class Event:
    """One event of a step. what: 'gradient' (the backward pass has come to the next gradient), 'work' (for `work` seconds), 'start' (of
    collective `name`, of a `kind`, with `nbytes` in this rank's buffer) or 'wait' (for it)."""

    what: str
    work: float = 0.0
    name: str = ""
    kind: str = ""
    nbytes: float = 0.0


@dataclass(frozen=True)
class Trace:
    """Holds the events of one rank's step in a world of one rank (`alone`) and of two (`pair`). dense: bytes of the gradients, as nodes sum
    them; two_level: whether the ranks stand for nodes, whose own ranks sum their gradients first."""

    alone: tuple[Event, ...]
    pair: tuple[Event, ...]
    dense: int
    two_level: bool = False

    def on(self, n: int) -> list[Event]:
        """Returns the events of one of n ranks."""
        events, gathered, kinds = [], False, {e.name: e.kind for e in self.pair if e.what == "start"}
        for one, two in zip(self.alone, self.pair, strict=True):
            if two.what == "wait":
                gathered = kinds[two.name] in GATHERS
            elif two.what == "work" and gathered:
                two = replace(two, work=two.work + (n - 2) * max(0.0, two.work - one.work))
            elif two.what == "start":
                share = 2 * max(0.0, one.nbytes - two.nbytes)  # b of a + b/n
                two = replace(two, nbytes=one.nbytes - share + share / n if share else two.nbytes)
            events.append(two)
        return events

    def nbytes(self, n: int) -> float:
        """Returns the bytes that one of n ranks hands to collectives in a step."""
        return sum(event.nbytes for event in self.on(n) if event.what == "start")

    def work(self, n: int) -> float:
        """Returns the seconds in which one of n ranks encodes and decodes."""
        return sum(event.work for event in self.on(n) if event.what == "work")


class _Overwriting(NumpyOps):
    """Writes results over the gradients, as torch's ops do."""

    def overwrite(self, tensor: Any, array: Any, spec: TensorSpec) -> bool:
        if array.ctypes.data != tensor.ctypes.data:
            tensor.reshape(-1)[...] = array
        return True


class _PretendedTransport(Transport):
    """Stands in for an engine, with its abilities. It takes no shortcut for two ranks, because the two stand for n."""

    pair = False

    def __init__(self, rank: int, size: int, ops: Ops, like: Transport | None):
        self.rank, self.size, self.ops = rank, size, ops
        if like is not None:
            self.gathers_uneven, self.scatters_uneven = like.gathers_uneven, like.scatters_uneven

    def start(self, collective: Collective, name: str) -> Any:
        raise NotImplementedError

    def wait(self, handle: Any) -> Any:
        raise NotImplementedError


def record(g: Grace, shapes: Shapes, *, steps: int = 3, lr: float | None = 0.1, like: Transport | None = None) -> Trace:
    """Returns the trace of this composition for gradients of these shapes. Each stretch of work is the median of `steps` steps after a
    first. like: a transport of the engine that is predicted; None: an engine that gathers and scatters equal sizes only. Raises
    UnsupportedError if the steps exchange different things."""
    between = g
    if g.two_level and g.policy is None:  # what one rank of each node does
        between = Grace(Composition(g.compressor, g.memory, g.communicator.inner(g.compressor)), g.seed)
    alone, pair = (_timed(between, shapes, n, steps, lr, like) for n in (1, 2))
    # Nodes sum float64 as it is, all other dtypes in float32 (exchange/hierarchy.py).
    dense = sum(spec.size * (8 if spec.dtype == "float64" else 4) for spec in specs_of(shapes))
    return Trace(alone, pair, dense, g.two_level)


def _timed(g: Grace, shapes: Shapes, n: int, steps: int, lr: float | None, like: Transport | None) -> tuple[Event, ...]:
    ops = host_ops(_Overwriting)
    drivers = [
        Driver(g, ops, _PretendedTransport(rank, n, ops, like), read_lr=lambda: lr, diverging=True, in_place=True) for rank in range(n)
    ]
    # numpy has no bfloat16; a float16 is as long.
    specs = [replace(spec, dtype="float16") if spec.dtype == "bfloat16" else spec for spec in specs_of(shapes)]
    drawn = [gradients(shapes, rank) for rank in range(n)]
    given = [{spec.name: mine[spec.name].astype(spec.dtype) for spec in specs} for mine in drawn]
    for driver in drivers:
        driver.register(specs)
        driver.skip_agreement()
    room = [{name: array.copy() for name, array in mine.items()} for mine in given]

    def run() -> list[Event]:
        for mine, source in zip(room, given, strict=True):
            for name, array in source.items():
                np.copyto(mine[name], array)
        return _step(drivers, room, ops)

    begin = time.perf_counter()
    run()
    times = 1 if time.perf_counter() - begin > PATIENCE else steps
    runs = [run() for _ in range(times)]
    if any([(e.what, e.kind) for e in events] != [(e.what, e.kind) for e in runs[0]] for events in runs):
        raise UnsupportedError(f"{g} exchanges something else from step to step, and a plan predicts one step; compare other specs")
    return tuple(sorted(same, key=lambda event: event.work)[times // 2] for same in zip(*runs, strict=True))


def _step(drivers: Sequence[Driver], given: Sequence[Mapping[str, np.ndarray]], ops: Ops) -> list[Event]:
    """Makes one step of all ranks side by side; returns the events of rank 0."""
    running = [_effects(driver, mine) for driver, mine in zip(drivers, given, strict=True)]
    answers: list[Any] = [None] * len(running)
    pending: dict[str, list[Collective]] = {}
    events: list[Event] = []
    while True:
        effects: list[Any] = []
        for rank, (generator, answer) in enumerate(zip(running, answers, strict=True)):
            begin = time.perf_counter()
            try:
                effects.append(generator.send(answer))
            except StopIteration:
                pass
            if rank == 0:
                events.append(Event("work", time.perf_counter() - begin))
        if not effects:
            return events
        first, answers = effects[0], [None] * len(running)
        if first is None:
            events.append(Event("gradient"))
        elif isinstance(first, Start):
            events.append(Event("start", name=first.name, kind=first.collective.kind, nbytes=first.collective.nbytes))
            pending[first.name] = [effect.collective for effect in effects]
        else:
            events.append(Event("wait", name=first.name))
            answers = execute(pending.pop(first.name), ops)


def _effects(driver: Driver, given: Mapping[str, np.ndarray]) -> Any:
    for name in reversed(list(driver.specs)):
        yield None  # the backward pass has come to this gradient
        yield from driver.put(name, given[name])
    yield from driver.finish()


@dataclass(frozen=True)
class Timed:
    """Holds the seconds of a step. step: from the beginning of the forward pass to the result; exchange: the step less the forward and
    backward pass; work: encoding and decoding; network: all collectives, one after another."""

    step: float
    exchange: float
    work: float
    network: float


def replay(events: Sequence[Event], network: Network, n: int, compute: float = 0.0) -> Timed:
    """Returns the times of one step on this network. compute: seconds of the forward pass (a third) and the backward pass (two thirds). The
    gradients come at equal intervals in the backward pass, which the driver's work delays (on a CPU one thread does both)."""
    gradients_ = sum(event.what == "gradient" for event in events)
    now = free = compute / 3
    work = carried = 0.0
    done: dict[str, float] = {}
    for event in events:
        if event.what == "gradient":
            now += 2 / 3 * compute / gradients_
        elif event.what == "work":
            now += event.work
            work += event.work
        elif event.what == "start":
            seconds = network(event.kind, n, event.nbytes)
            free = done[event.name] = max(now, free) + seconds
            carried += seconds
        else:
            now = max(now, done[event.name])
    return Timed(now, now - compute, work, carried)
