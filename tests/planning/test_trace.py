"""Holds the work and the bytes that a plan predicts for n ranks to steps of n simulated ranks, by counted work instead of measured time."""

from __future__ import annotations

import inspect
import time
from typing import Any

import numpy as np
import pytest

from grace_ext.planning import trace
from grace_ext.planning.candidates import completed

SHAPES = {"conv": (64, 32, 3, 3), "fc": (300, 200), "bias": (300,)}
#: What a call takes, in the time that it takes to pass over one element.
CALL = 500.0


class Counting(trace._Overwriting):
    """Counts its own calls and the elements that they take and return. `work` is the sum, in a unit that no other process disturbs."""

    def __init__(self) -> None:
        self.work = 0.0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not inspect.ismethod(found):
            return found

        def counted(*args: Any, **knobs: Any) -> Any:
            done = found(*args, **knobs)
            self.work += CALL + _elements(done) + _elements(args)
            return done

        return counted


def _elements(value: Any) -> int:
    """Returns how many array elements there are in a value or in a list of values."""
    return sum(map(_elements, value)) if isinstance(value, (list, tuple)) else value.size if isinstance(value, np.ndarray) else 0


@pytest.fixture
def counted(monkeypatch, small_shards):
    """The clock that shows the work done so far, by all ranks."""
    ops = Counting()
    monkeypatch.setattr(trace, "host_ops", lambda border: ops)
    return lambda: ops.work


#: Compositions with one payload of each rank (gathers), with shards (all-to-all and a gather of results), and with both.
SPECS = (
    "none", "fp16", "fp16 @ reduce_scatter", "fp16 @ broadcast", "qsgd(bits=4)", "qsgd @ reduce_scatter", "topk(ratio=0.01)",
    "topk(ratio=0.01) @ reduce_scatter", "topk(ratio=0.01) @ sparse_allreduce", "dgc @ sparse_allreduce", "powersgd(rank=2)", "signsgd",
    "signsgd @ allreduce", "signsgd @ reduce_scatter", "efsignsgd @ reduce_scatter", "onebit @ reduce_scatter", "scaled_int",
)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_for_more_ranks_is_what_they_do(spec, counted):
    """The work of n ranks is predicted from steps of one and two within 20%, their bytes within 3%."""
    g = completed(spec)
    predicted = trace.record(g, SHAPES, steps=1, clock=counted)
    for n in (2, 4, 8, 16):
        events, _ = trace.timed(g, SHAPES, n, 1, clock=counted)
        work, nbytes = (sum(getattr(event, what) for event in events) for what in ("work", "nbytes"))
        assert predicted.work(n) == pytest.approx(work, rel=0.2), n
        assert predicted.nbytes(n) == pytest.approx(nbytes, rel=0.03), n


def test_shards_cost_no_more_with_more_ranks(counted):
    """At 64 ranks a 16-bit sum takes little more work than at 2, because each rank adds up its shard only; a gather decodes 64 payloads."""
    fp16, gathered = (trace.record(completed(spec), SHAPES, steps=1, clock=counted) for spec in ("fp16", "qsgd(bits=4)"))
    assert fp16.work(64) < 1.5 * fp16.work(2) < gathered.work(64)
    assert gathered.work(64) - gathered.work(2) == pytest.approx(62 * (gathered.work(3) - gathered.work(2)))


def test_the_times_after_an_all_to_all_are_not_extrapolated():
    """What two ranks needed longer than one for a shard is noise or a cache; times 62 it made fp16 slower than dense at 64 workers."""

    def step(noise: float, share: float) -> tuple[trace.Event, ...]:
        events = [trace.Event("work", 2.0)]
        for name, kind, nbytes in (("/0/1/pieces", "alltoall", 8.0), ("/0/2/shares", "allgather", share)):
            wait = (trace.Event("wait", name=name), trace.Event("work", 1 + noise))
            events += [trace.Event("start", name=name, kind=kind, nbytes=nbytes), trace.Event("work", 0.0), *wait]
        return tuple(events)

    found = trace.Trace(step(0.0, 8), step(0.5, 4), dense=16, piece=0.01)
    assert found.work(2) == 5 and found.work(64) == pytest.approx(5 + 62 * 0.01)
    assert found.nbytes(64) == pytest.approx(8 + 8 / 64)


def test_a_busy_machine():
    """A trace says when it was taken and how much its steps differed. It is doubtful if they differed by more than half, or if more
    processes wanted to run than there are processors."""
    ticks = iter(range(10**9))
    found = trace.record(completed("none"), SHAPES, steps=3, clock=lambda: next(ticks))
    assert found.taken.spread == 0 and 0 <= time.time() - found.taken.at < 60
    assert trace.record(completed("none"), SHAPES, steps=1).taken.spread is None
    busy = [trace.Taken(spread=spread, load=load).busy for spread in (None, 0.1, 0.6) for load in (None, 0.9, 1.5)]
    assert busy == [False, False, True, False, False, True, True, True, True]
