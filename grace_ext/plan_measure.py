"""`grace-ext plan --measure`: the plan of a job that is there, from a short probe of its own network and of some real exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .composition import Grace
from .errors import UnsupportedError
from .frameworks.base import Transport
from .plan import Model
from .probe import MeasuredNetwork, Ranks
from .trace import Shapes, Trace, record


def probed(
    transport: Transport, chosen: dict[str, Grace], shapes: Shapes, *, compute: float, exchanges: int,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Model, MeasuredNetwork, dict[str, float]]:  # fmt: skip
    """The model, the network and the seconds of real exchanges: of dense, and of the `exchanges` candidates that seem fastest. Collective;
    the same on all ranks. Codecs are timed on all ranks at once, as they run in training."""
    if transport.size < 2:
        raise UnsupportedError("--measure needs a job of two ranks or more: start it by horovodrun, torchrun or mpirun, or state --rate")
    ranks = Ranks(transport)
    tell("network")
    network = ranks.collectives()
    traces = {}
    for text, g in chosen.items():
        tell(text)
        ranks.barrier()
        traces[text] = slowest(ranks, record(g, shapes, like=transport))
    model = Model(traces, transport.size, compute=compute)
    dense, *others = sorted(traces, key=lambda text: (text != next(iter(traces)), model.timed(text, network).step))
    measured = {}
    for text in [dense, *others[:exchanges]]:
        tell(f"exchange: {text}")
        measured[text] = ranks.exchange(chosen[text], shapes)
    return model, network, measured


def slowest(ranks: Ranks, trace: Trace) -> Trace:
    """With each stretch of work as long as on the rank where it took longest."""
    alone, pair = (ranks.largest([event.work for event in events]) for events in (trace.alone, trace.pair))
    both = zip((trace.alone, trace.pair), (alone, pair), strict=True)
    made = [tuple(replace(e, work=w) for e, w in zip(events, works, strict=True)) for events, works in both]
    return Trace(made[0], made[1], trace.dense)

