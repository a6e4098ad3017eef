"""The plan of a job that is there, from a short probe of its own network and of some real exchanges: `--measure`, and policy 'auto'."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..composition.grace import Grace
from ..driver.driver import Driver
from ..exchange.effects import Effects
from .plan import Model, Prediction
from .probe import SIZES, Probe
from .shapes import Shapes, gradients, specs_of
from .trace import Trace, record

Tell = Callable[[str], None]
#: Steps until memory is used again: old and new state, and the collectives' buffers.
WARM = 2


def probed(
    probe: Probe, chosen: dict[str, Grace], shapes: Shapes, *, compute: float, exchanges: int, sizes: Sequence[int] = SIZES,
    steps: int = 3, tell: Tell = lambda text: None,
) -> Effects:  # fmt: skip
    """(model, network, seconds of real exchanges by spec): exchanges of dense, of so many candidates that seem fastest, and of all in
    two levels. The same on all ranks. Codecs are timed on all ranks at once, as they run in training. Effects, as all of Probe."""
    tell("the network")
    network = yield from probe.collectives(sizes)
    traces = {}
    for text, g in chosen.items():
        tell(text)
        yield from probe.barrier()
        traces[text] = yield from slowest(probe, record(g, shapes, steps=steps, like=probe.transport))
    model = Model(traces, probe.n, compute=compute)
    dense, *others = sorted(traces, key=lambda text: (text != next(iter(traces)), model.timed(text, network).step))
    measured = {}
    levels = [text for text in others[exchanges:] if traces[text].two_level]  # of which nothing is known without
    for text in [dense, *others[:exchanges], *levels]:
        tell(f"exchanges by {text}")
        measured[text] = yield from exchange_seconds(probe, chosen[text], shapes)
    return model, network, measured


def rows_of(found: tuple) -> list[Prediction]:
    """The candidates, from what `probed` gives."""
    model, network, measured = found
    return model.rows(network, network.link, measured)


def slowest(probe: Probe, trace: Trace) -> Effects:
    """The trace with each stretch of work as long as on the rank where it took longest."""
    made = []
    for events in (trace.alone, trace.pair):
        works = yield from probe.largest([event.work for event in events])
        made.append(tuple(replace(event, work=work) for event, work in zip(events, works, strict=True)))
    return replace(trace, alone=made[0], pair=made[1])


def exchange_seconds(probe: Probe, g: Grace, shapes: Shapes, steps: int = 5, budget: float = 6.0) -> Effects:
    """Times exchanges of such gradients by this composition, on all ranks. Returns the median seconds of at most `steps` exchanges after
    WARM, or of as many as `budget` seconds allow, but at least one after a first."""
    driver = Driver(g, probe.ops, probe.transport, read_lr=lambda: 0.1, in_place=True)
    specs = specs_of(shapes)
    driver.register(specs)
    drawn = gradients(shapes, probe.transport.rank)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < steps + WARM and sum(seconds) + seconds[-1] <= budget):
        given = {spec.name: probe.ops.emit(drawn[spec.name].reshape(-1).copy(), spec) for spec in specs}
        yield from probe.barrier()
        begin = time.perf_counter()
        yield from driver.exchange(given)
        seconds += yield from probe.largest([time.perf_counter() - begin])
    return float(np.median(seconds[min(WARM, len(seconds) - 1) :]))
