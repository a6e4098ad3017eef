"""Plans for the running job, by a short measurement of its own network and of some real exchanges: `--measure`, and policy 'auto'."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..composition.grace import Grace
from ..driver.driver import Driver
from ..exchange.effects import Effects
from .host import HostCopies
from .plan import Model, Prediction
from .probe import SIZES, Probe
from .shapes import Shapes, gradients, specs_of
from .trace import Trace, record

Tell = Callable[[str], None]
#: Steps that are not counted: by then old and new state, and the collectives' buffers, have been allocated.
WARM = 2


def probed(
    probe: Probe, chosen: dict[str, Grace], shapes: Shapes, *, compute: float, exchanges: int, sizes: Sequence[int] = SIZES,
    steps: int = 3, tell: Tell = lambda text: None, host: HostCopies | None = None,
) -> Effects:  # fmt: skip
    """Returns (model, network, seconds of real exchanges by spec), the same on all ranks. A generator of effects, as all of Probe.

    Really exchanged are: dense, the `exchanges` candidates that are predicted to be fastest, and all candidates in two levels. Codecs are
    timed on all ranks at once, as they run in training. host: copies between GPU and host, which no exchange here makes."""
    tell("the network")
    network = yield from probe.collectives(sizes)
    traces = {}
    for text, g in chosen.items():
        tell(text)
        yield from probe.barrier()
        traces[text] = yield from slowest(probe, record(g, shapes, steps=steps, like=probe.transport))
    model = Model(traces, probe.n, compute=compute, host=host)
    dense, *others = sorted(traces, key=lambda text: (text != next(iter(traces)), model.timed(text, network).step))
    measured = {}
    levels = [text for text in others[exchanges:] if traces[text].two_level]  # which cannot be predicted: the nodes are not known
    for text in [dense, *others[:exchanges], *levels]:
        tell(f"exchanges by {text}")
        measured[text] = yield from exchange_seconds(probe, chosen[text], shapes)
    return model, network, measured


def rows_of(found: tuple) -> list[Prediction]:
    """Returns a prediction for each candidate from the result of `probed`."""
    model, network, measured = found
    return model.rows(network, network.link, measured)


def slowest(probe: Probe, trace: Trace) -> Effects:
    """Returns the trace with each stretch of work as long as on the rank that needed longest for it; so all ranks plan the same."""
    made = []
    for events in (trace.alone, trace.pair):
        works = yield from probe.largest([event.work for event in events])
        made.append(tuple(replace(event, work=work) for event, work in zip(events, works, strict=True)))
    (piece,) = yield from probe.largest([trace.piece])
    return replace(trace, alone=made[0], pair=made[1], piece=piece)


def exchange_seconds(probe: Probe, g: Grace, shapes: Shapes, steps: int = 5, budget: float = 6.0) -> Effects:
    """Times exchanges of gradients of these shapes with this composition, on all ranks. Returns the median seconds of at most `steps`
    exchanges after WARM others, or of as many as fit into `budget` seconds, but of at least one after a first."""
    driver = Driver(g, probe.ops, probe.transport, read_lr=lambda: 0.1, in_place=True)
    specs = specs_of(shapes)
    driver.register(specs)
    drawn = gradients(shapes, probe.transport.rank)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < steps + WARM and sum(seconds) + seconds[-1] <= budget):
        given = {spec.name: probe.ops.emit(probe.ops.upload(drawn[spec.name].reshape(-1).copy()), spec) for spec in specs}
        yield from probe.barrier()
        begin = time.perf_counter()
        yield from driver.exchange(given)
        seconds += yield from probe.largest([time.perf_counter() - begin])
    return float(np.median(seconds[min(WARM, len(seconds) - 1) :]))
