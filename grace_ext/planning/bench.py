"""Times the parts on this machine for `grace-ext bench`, in multiples of a copy of the same gradient, which is timed with them."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .._version import __version__
from ..arrays import kernels
from ..arrays.compiled import host_ops
from ..arrays.numpy import NumpyOps
from ..communicators.shards import shards
from ..composition.grace import Grace
from ..exchange.tensor import Job, exchange_tensor, initial_state, replaced
from ..parts.field import HALVES
from ..parts.requests import AllReduce, Gather, Scatter, Together
from ..parts.tensor import StepInfo, TensorSpec
from .candidates import completed

RANKS = 2
#: If one step of a part would take more than this many seconds, it is measured on a gradient 1/SMALLER as large.
PATIENCE = 5.0
SMALLER = 25
#: The gradient's standard deviation: so small that 'threshold' with its default sends about 1% of the elements per step, once its
#: residual has stopped growing. That takes SETTLING steps, which are made before those that are measured.
SCALE = np.float32(1.7e-4)
SETTLING = 200
#: The number of gradients that are compressed in turn. If one were repeated, error feedback would make sums that no training has.
GRADIENTS = 4


@dataclass(frozen=True)
class Timing:
    """Holds the times of one spec on one gradient. `encode`: memory and compressor, except for decoding; `decode`: decoding and adding up,
    per rank's payload (once, if the network added the payloads up); both in multiples of a copy, as medians of `times` steps. For
    compressors with rounds of their own, `encode` is everything and `decode` is 0. `error`: ||result - mean|| / ||mean|| of the first
    step."""

    spec: str
    elements: int
    encode: float
    decode: float
    copy_ms: float
    bytes_per_element: float
    error: float
    times: int


def processor() -> str:
    """Returns the processor's name as the system gives it, else its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: the processor and the versions, without the host's name."""
    return {
        "processor": processor(), "threads": 1, "python": platform.python_version(), "numpy": np.__version__,
        "grace_ext": __version__, "kernels": kernels.enabled(),
    }  # fmt: skip


def rows(texts: list[str], elements: int, times: int) -> Iterator[Timing]:
    """Yields one row per spec, as soon as it is measured."""
    for text in texts:
        small = max(4, elements // SMALLER)
        first = measure(text, small, 1)
        slow = (first.encode + RANKS * first.decode) * first.copy_ms * SMALLER / 1000 > PATIENCE
        yield measure(text, small if slow and elements > 10**6 else elements, times)


def measure(text: str, elements: int, times: int) -> Timing:
    """Times one spec on a Gaussian matrix of about `elements` elements, with sides of 1 : 6 (the ratio of a Transformer's widest layer)."""
    g, ops = completed(text), host_ops(NumpyOps)
    a = max(1, round((elements / 6) ** 0.5))
    spec = TensorSpec("w", (a, max(1, elements // a)))
    rng = np.random.default_rng(0)
    gradients = [SCALE * rng.standard_normal(spec.size, np.float32) for _ in range(GRADIENTS)]
    room, copies, encodes, decodes, run = np.empty_like(gradients[0]), [], [], [], _Run(g, ops, spec)
    settled = SETTLING if hasattr(g.compressor, "threshold") else 1
    for step in range(settled + 1 + times):
        gradient = gradients[step % GRADIENTS]
        copies.append(_timed(partial(np.copyto, room, gradient)))  # leaves the gradient in `room`, which the result is written over
        encode, decode = run.step(room, step)
        if step == 0:
            error = float(np.linalg.norm(run.result - gradient) / np.linalg.norm(gradient))
        if step > settled:
            encodes.append(encode)
            decodes.append(decode)
    copy = statistics.median(copies[settled:])
    row = Timing(
        str(g), spec.size, statistics.median(encodes) / copy, statistics.median(decodes) / copy, 1000 * copy, run.nbytes / spec.size,
        error, times,
    )  # fmt: skip
    return row


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class _Run:
    """Runs one rank of two; the peer sends the same payloads."""

    def __init__(self, g: Grace, ops: Any, spec: TensorSpec):
        self.ops, self.spec = ops, spec
        self.state: dict[str, Any] = {}
        self.rank = min(shards(spec.name, spec.size, RANKS))  # it has a shard of the tensor, if shards are exchanged
        compressor, memory, communicator = g.parts_for(spec)
        self.parts = self._decoding_timed(compressor), memory, communicator
        self.nbytes, self.decoding, self.result = 0, 0.0, np.empty(0)

    def _decoding_timed(self, compressor: Any) -> Any:
        """Returns a copy of the compressor that adds the seconds of its decoding calls to `decoding`. It makes none if the network counts
        votes, or if it has rounds of its own."""
        timed = copy.copy(compressor)

        def watched(method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                start = time.perf_counter()
                try:
                    return method(*args)
                finally:
                    self.decoding += time.perf_counter() - start

            return run

        for name in ("combine", "decompress_into"):
            object.__setattr__(timed, name, watched(getattr(timed, name)))
        return timed

    def step(self, gradient: np.ndarray, number: int) -> tuple[float, float]:
        """Makes one step; returns the seconds of encoding, and those of decoding per rank."""
        info = StepInfo(number, self.rank, RANKS, RANKS, elements=self.spec.size)
        self.state = self.state or initial_state(self.ops, self.spec, self.parts, info)
        running = exchange_tensor(self.ops, Job(self.spec, *self.parts, gradient, self.state, gradient), info)
        spent, answer, self.nbytes, self.decoding = 0.0, None, 0, 0.0
        while True:
            start = time.perf_counter()
            try:
                request = running.send(answer)
            except StopIteration as stop:
                spent += time.perf_counter() - start
                old, self.state, self.result = self.state, stop.value.state, stop.value.output
                break
            spent += time.perf_counter() - start
            answer = self._answer(request)
        self.ops.recycle(replaced(old, self.state))
        return spent - self.decoding, self.decoding / RANKS if self.parts[2].name != "allreduce" else self.decoding

    def _answer(self, request: Any) -> Any:
        if isinstance(request, Together):
            return request.combine([request.value])[0]
        if isinstance(request, AllReduce):
            self.nbytes += request.array.nbytes if request.dtype in HALVES else len(request.array) * np.dtype(request.dtype).itemsize
            return request.array.copy()
        if isinstance(request, Gather):
            self.nbytes += sum(piece.nbytes for piece in request.payload)
            return [request.payload] * (RANKS if request.by_rank is None else len(request.by_rank))
        assert isinstance(request, Scatter)
        self.nbytes += sum(piece.nbytes for payload in request.payloads.values() for piece in payload)
        return [request.payloads[self.rank]] * RANKS
