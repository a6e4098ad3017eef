"""Records what one rank does in a step (work, collectives started and waited for) from the real driver, and replays it on any network.

`record` runs the real driver and codecs for one and for two simulated ranks, with the collectives as an engine carries them, and times
every stretch of work between two of the driver's effects. `Trace.on(n)` extrapolates this to n ranks, by what each rank receives:

    all-reduce               one array                         the work stays the same
    all-gather, broadcast    n payloads                        the work after it grows by the time to decode one payload more
    all-to-all               n pieces, each 1/n of a payload   the work stays the same, except for the calls for one more piece
    the gather after that    n shares, each 1/n of the result  likewise; and the result itself may grow: the union of sparse_allreduce

The calls for one more piece hardly depend on its size, so they are timed on tensors of few elements, where nothing hides them: FEW, or as
many as are cut into four shards (communicators/shards.py). Shares are means over the ranks; if tensors are too small to be cut among all
of them, some ranks have more. In two levels, the ranks of a trace are nodes. `replay` computes the time line: one thread works, while one
network carries the collectives in the order in which they were started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.compiled import host_ops
from ..arrays.numpy import NumpyOps
from ..communicators import shards
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
Clock = Callable[[], float]
#: The time that this thread computes, if the system tells it precisely.
CPU: Clock = time.thread_time if time.get_clock_info("thread_time").resolution <= 1e-6 else time.perf_counter
GATHERS = ("allgather", "broadcast")
#: If the first step takes more than this many seconds, one more is timed, instead of `steps`.
PATIENCE = 3.0
#: The calls for one more piece of an all-to-all are timed with these numbers of ranks, on tensors of FEW elements unless they are cut.
FEW, PIECES = 1024, (2, 4)
#: Above this spread of its steps, or this load, a machine is busy (see Taken).
WIDE, FULL = 0.5, 1.0


@dataclass(frozen=True)
class Event:
    """One event of a step. what: 'gradient' (the backward pass has come to the next gradient), 'work' (for `work` seconds), 'start' (of
    collective `name`, of a `kind`, with `nbytes` in this rank's buffer) or 'wait' (for it). A name is bucket/turn/label (driver.py)."""

    what: str
    work: float = 0.0
    name: str = ""
    kind: str = ""
    nbytes: float = 0.0

    @property
    def turn(self) -> str:
        """Names the collectives that a bucket starts at once; it goes on when it has waited for all of them."""
        return self.name.rpartition("/")[0] or self.name

    @property
    def bucket(self) -> str:
        return self.turn.rpartition("/")[0] or self.turn


@dataclass(frozen=True)
class Taken:
    """Says how a trace was timed. at: when, in seconds since 1970; spread: by what fraction the slowest step took longer than the fastest,
    None if only one was timed; load: of the machine before it, in runnable processes per processor, None if the system does not tell."""

    at: float = 0.0
    spread: float | None = None
    load: float | None = None

    @property
    def busy(self) -> bool:
        """Whether other processes disturbed it so much that its times are doubtful."""
        return (self.spread or 0.0) > WIDE or (self.load or 0.0) > FULL


@dataclass(frozen=True)
class Trace:
    """Holds the events of one rank's step in a world of one rank (`alone`) and of two (`pair`). dense: bytes of the gradients, as nodes sum
    them; two_level: whether the ranks stand for nodes, whose own ranks sum their gradients first; piece: seconds of the calls for one more
    piece of an all-to-all; shards: the most shards of each tensor that is cut into shards."""

    alone: tuple[Event, ...]
    pair: tuple[Event, ...]
    dense: int
    two_level: bool = False
    piece: float = 0.0
    taken: Taken = Taken()
    shards: tuple[int, ...] = ()

    def on(self, n: int) -> list[Event]:
        """Returns the events of one of n ranks."""
        new = self._new()
        decoding, cutting = _decoding(self.pair, new), _cutting(self.pair)
        growth = {whole: self._growth([place for place, its in decoding.items() if (its == 1) == whole]) for whole in (True, False)}
        events = []
        for place, (one, two) in enumerate(zip(self.alone, self.pair, strict=True)):
            if two.what == "start":
                two = replace(two, nbytes=_nbytes(one, two, new.get(two.name, 1.0), n))
            if place in decoding:
                two = replace(two, work=two.work * (1 + growth[decoding[place] == 1] * _sum(decoding[place], 1, n - 1)))
            if place in cutting:
                two = replace(two, work=two.work + more_pieces(self.shards, n) * self.piece / len(cutting))
            events.append(two)
        return events

    def _new(self) -> dict[str, float]:
        """Returns, by the name of each gather, which fraction of what a further rank adds is new. A payload is new altogether (1). A result
        of fixed size, of which each rank gathers a share, does not grow (0). A union of selections grows by the elements that no other
        rank has selected, until it has all."""
        shares = _shares(self.pair)
        starts = {two.name: (one.nbytes, two.nbytes) for one, two in zip(self.alone, self.pair, strict=True) if two.kind in GATHERS}
        halved = {name for name, (one, two) in starts.items() if two < 0.75 * one}
        selected = sum(one for name, (one, _) in starts.items() if name in shares - halved)
        union = max(0.0, 1 - selected / self.dense) if self.dense else 0.0
        return {name: 1.0 if name not in shares else 0.0 if name in halved else union for name in starts}

    def _growth(self, places: Sequence[int]) -> float:
        """Returns by what fraction the work at these places, taken together, grows if another rank's payload is decoded. The growth of a
        single place is mostly noise, which would be multiplied by the number of ranks."""
        one, two = (sum(events[place].work for place in places) for events in (self.alone, self.pair))
        return max(0.0, two - one) / two if two else 0.0

    def nbytes(self, n: int) -> float:
        """Returns the bytes that one of n ranks hands to collectives in a step."""
        return sum(event.nbytes for event in self.on(n) if event.what == "start")

    def work(self, n: int) -> float:
        """Returns the seconds in which one of n ranks encodes and decodes."""
        return sum(event.work for event in self.on(n) if event.what == "work")


def more_pieces(shards: Sequence[int], n: int) -> int:
    """Returns how many pieces n ranks handle more than two do: a message per rank, and the shards."""
    return n - 2 + sum(min(n, most) - min(2, most) for most in shards)


def _nbytes(one: Event, two: Event, new: float, n: int) -> float:
    """Returns the bytes of one of n ranks' buffer for a collective that has these with one and with two ranks."""
    if new < 1:
        return two.nbytes * (_sum(new, 0, n) / n) / (_sum(new, 0, 2) / 2)
    lists = two.kind in GATHERS and two.nbytes == 2 * one.nbytes  # of one size per rank
    headers = two.kind == "alltoall"  # one per piece
    return two.nbytes + (n - 2) * max(0.0, two.nbytes - one.nbytes) if lists or headers else two.nbytes


def _sum(base: float, first: int, end: int) -> float:
    """Returns base**first + base**(first + 1) + ... + base**(end - 1)."""
    return float(end - first) if base == 1 else (base**first - base**end) / (1 - base)


def _shares(events: Sequence[Event]) -> set[str]:
    """Returns the names of the gathers that a bucket starts once an all-to-all has brought it its pieces: each rank gathers a share."""
    scattered: dict[str, str] = {}
    found = set()
    for event in events:
        if event.kind == "alltoall":
            scattered.setdefault(event.bucket, event.turn)
        elif event.kind in GATHERS and scattered.get(event.bucket, event.turn) != event.turn:
            found.add(event.name)
    return found


def _after(events: Sequence[Event]) -> dict[str, int]:
    """Returns, by turn, the place of the work after the last wait for its collectives, which takes all of their results."""
    return {event.turn: place + 1 for place, event in enumerate(events) if event.what == "wait"}


def _decoding(events: Sequence[Event], new: Mapping[str, float]) -> dict[int, float]:
    """Returns the places of the work that decodes what was gathered, each with the fraction of it that is new (see Trace._new)."""
    after, found = _after(events), dict[int, float]()
    for event in events:
        if event.kind in GATHERS:
            found[after[event.turn]] = max(new[event.name], found.get(after[event.turn], 0.0))
    return found


def _cutting(events: Sequence[Event]) -> set[int]:
    """Returns the places of the work that is done piece by piece: before and after each all-to-all, and after each gather of shares."""
    after, shares = _after(events), _shares(events)
    starts = {place: event for place, event in enumerate(events) if event.what == "start"}
    before = {place - 1 for place, event in starts.items() if event.kind == "alltoall"}
    return before | {after[event.turn] for event in starts.values() if event.kind == "alltoall" or event.name in shares}


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


def record(
    g: Grace, shapes: Shapes, *, steps: int = 3, lr: float | None = 0.1, like: Transport | None = None, clock: Clock = time.perf_counter
) -> Trace:
    """Returns the trace of this composition for gradients of these shapes. Each stretch of work is the shortest of `steps` steps after a
    first. like: a transport of the engine that is predicted; None: an engine that gathers and scatters equal sizes only. clock: CPU leaves
    out what other processes take; by default all of the time counts, as in a job. Raises UnsupportedError if the steps exchange different
    things."""
    between = g
    if g.two_level and g.policy is None:  # what one rank of each node does
        between = Grace(Composition(g.compressor, g.memory, g.communicator.inner(g.compressor)), g.seed)
    load, at = _load(), time.time()
    (alone, _), (pair, spread) = (timed(between, shapes, n, steps, lr, like, clock) for n in (1, 2))
    piece, cut = 0.0, any(event.name.rpartition("/")[2].startswith("scatter.") for event in pair)
    sizes = [spec.size for spec in specs_of(shapes)] if cut else []
    if _cutting(pair):
        limit = max(FEW, PIECES[1] * shards.FEWEST) if cut else FEW
        few = {spec.name: replace(spec, shape=(min(spec.size, limit),)) for spec in specs_of(shapes)}
        fewer, more = (timed(between, few, n, steps, lr, like, clock)[0] for n in PIECES)
        each = [sum(events[place].work for place in _cutting(events)) for events in (fewer, more)]
        added = more_pieces([shards.most(min(size, limit)) for size in sizes], PIECES[1])
        piece = max(0.0, each[1] - each[0]) / added
    # Nodes sum float64 as it is, all other dtypes in float32 (exchange/hierarchy.py).
    dense = sum(spec.size * (8 if spec.dtype == "float64" else 4) for spec in specs_of(shapes))
    most = tuple(shards.most(size) for size in sizes)
    return Trace(alone, pair, dense, g.two_level, piece, Taken(at, spread, load), most)


def _load() -> float | None:
    """Returns the runnable processes per processor, averaged over the last minute; None if the system does not tell."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None


def timed(
    g: Grace, shapes: Shapes, n: int, steps: int, lr: float | None = 0.1, like: Transport | None = None, clock: Clock = time.perf_counter
) -> tuple[tuple[Event, ...], float | None]:
    """Returns the events of rank 0 of n simulated ranks, and the spread of its steps (see Taken). Its work, and the bytes that it gathers,
    are means over the ranks, because they may have uneven shares."""
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
        return _step(drivers, room, ops, clock)

    begin = time.perf_counter()
    run()
    times = 1 if time.perf_counter() - begin > PATIENCE else steps
    runs = [run() for _ in range(times)]
    if any([(e.what, e.kind) for e in events] != [(e.what, e.kind) for e in runs[0]] for events in runs):
        raise UnsupportedError(f"{g} exchanges something else from step to step, and a plan predicts one step; compare other specs")
    seconds = [sum(event.work for event in events) for events in runs]
    spread = max(seconds) / min(seconds) - 1 if times > 1 else None
    return tuple(min(same, key=lambda event: event.work) for same in zip(*runs, strict=True)), spread


def _step(drivers: Sequence[Driver], given: Sequence[Mapping[str, np.ndarray]], ops: Ops, clock: Clock) -> list[Event]:
    """Makes one step of all ranks side by side; returns the events, as `timed` does."""
    running = [_effects(driver, mine) for driver, mine in zip(drivers, given, strict=True)]
    answers: list[Any] = [None] * len(running)
    pending: dict[str, list[Collective]] = {}
    events: list[Event] = []
    while True:
        effects: list[Any] = []
        work = 0.0
        for generator, answer in zip(running, answers, strict=True):
            begin = clock()
            try:
                effects.append(generator.send(answer))
            except StopIteration:
                pass
            work += clock() - begin
        events.append(Event("work", work / len(running)))
        if not effects:
            return events
        first, answers = effects[0], [None] * len(running)
        if first is None:
            events.append(Event("gradient"))
        elif isinstance(first, Start):
            nbytes, kind = [effect.collective.nbytes for effect in effects], first.collective.kind
            events.append(Event("start", name=first.name, kind=kind, nbytes=sum(nbytes) / len(nbytes) if kind in GATHERS else nbytes[0]))
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
    backward pass; work: encoding and decoding; network: all collectives, one after another; copies: between GPU and host (host.py)."""

    step: float
    exchange: float
    work: float
    network: float
    copies: float = 0.0


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
