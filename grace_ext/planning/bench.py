"""How fast the parts are on this machine: `grace-ext bench`. Times are multiples of a copy of the same gradient, measured beside them."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import compressors
from .._version import __version__
from ..arrays import kernels
from ..arrays.compiled import host_ops
from ..arrays.numpy import NumpyOps
from ..composition.grace import Grace
from ..composition.making import grace
from ..exchange.tensor import Job, exchange_tensor, initial_state, replaced
from ..parts.field import HALVES
from ..parts.requests import AllReduce, Gather, Scatter, Together
from ..parts.tensor import StepInfo, TensorSpec

RANKS = 2
#: A part that would take longer than this for one step is measured on a gradient a 25th as large.
PATIENCE = 5.0
SMALLER = 25
#: The gradient's standard deviation, so small that 'threshold' with its default sends about 1% of the elements a step, once its residual
#: has grown to where it stays: so many steps go before those that are measured.
SCALE = np.float32(1.7e-4)
SETTLING = 200
#: Gradients that are compressed in turn. Of one alone, over and over, error feedback would make sums that no training has.
GRADIENTS = 4


@dataclass(frozen=True)
class Timing:
    """One spec on one gradient. `encode`: memory and compressor, all but decoding; `decode`: decoding and adding up, for each rank's
    payload (once, where the network added them up); both in multiples of a copy, as medians of `times` steps. For compressors with rounds
    of their own `encode` is everything, and `decode` 0. `error`: ||result - mean|| / ||mean|| of a first step."""

    spec: str
    elements: int
    encode: float
    decode: float
    copy_ms: float
    bytes_per_element: float
    error: float
    times: int


def processor() -> str:
    """The processor's name as the system has it, else its kind."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures depend on, without names."""
    return {
        "processor": processor(), "threads": 1, "python": platform.python_version(), "numpy": np.__version__,
        "grace_ext": __version__, "kernels": kernels.enabled(),
    }  # fmt: skip


def specs(names: tuple[str, ...]) -> list[str]:
    """What is measured: the specs given, or every compressor with its natural memory; a name alone gets that, too."""
    chosen = []
    for text in names or compressors.names():
        bare = text in compressors.names()
        chosen.append(f"{text} + {compressors.get(text)().natural_memory}" if bare else text)
    return chosen


def rows(texts: list[str], elements: int, times: int) -> Iterator[Timing]:
    """One row a spec, as they are measured."""
    for text in texts:
        small = max(4, elements // SMALLER)
        first = measure(text, small, 1)
        slow = (first.encode + RANKS * first.decode) * first.copy_ms * SMALLER / 1000 > PATIENCE
        yield measure(text, small if slow and elements > 10**6 else elements, times)


def measure(text: str, elements: int, times: int) -> Timing:
    """Times one spec on a Gaussian matrix of about so many elements (a : b = 1 : 6, as the widest layer of a Transformer has)."""
    g, ops = grace(text), host_ops(NumpyOps)
    a = max(1, round((elements / 6) ** 0.5))
    spec = TensorSpec("w", (a, max(1, elements // a)))
    rng = np.random.default_rng(0)
    gradients = [SCALE * rng.standard_normal(spec.size, np.float32) for _ in range(GRADIENTS)]
    room, copies, encodes, decodes, run = np.empty_like(gradients[0]), [], [], [], _Run(g, ops, spec)
    settled = SETTLING if hasattr(g.compressor, "threshold") else 1
    for step in range(settled + 1 + times):
        gradient = gradients[step % GRADIENTS]
        copies.append(_timed(partial(np.copyto, room, gradient)))  # leaves it in `room`, which the result is written over
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
    """One rank of two, whose peer sends the same."""

    def __init__(self, g: Grace, ops: Any, spec: TensorSpec):
        self.ops, self.spec, self.state = ops, spec, {}
        compressor, memory, communicator = g.parts_for(spec)
        self.parts = self._decoding_timed(compressor), memory, communicator
        self.nbytes, self.decoding, self.result = 0, 0.0, np.empty(0)

    def _decoding_timed(self, compressor: Any) -> Any:
        """A copy that adds to `decoding` the seconds of what gives the result of a payload, or of all ranks'; none where there is no such
        call (votes that the network counts, rounds of their own)."""
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
        """(seconds of encoding, of decoding per rank)"""
        info = StepInfo(number, 0, RANKS, RANKS)
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
            return [request.payload] * RANKS
        assert isinstance(request, Scatter)
        self.nbytes += sum(piece.nbytes for payload in request.payloads for piece in payload)
        return [request.payloads[0]] * RANKS
