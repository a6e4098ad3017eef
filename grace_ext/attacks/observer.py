"""Observes what one rank sends of each gradient in a LocalCluster, and what that says of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..cluster import LocalCluster
from ..communicators.base import Communicator
from ..composition import making
from ..compressors.base import Compressor, Observed, whole
from ..driver.observer import Observer
from ..errors import UnsupportedError
from ..exchange.tensor import Job, Outcome, Watch
from ..frameworks.torch.ops import TorchOps
from ..parts.ops import Ops
from ..parts.requests import AllReduce, Gather, Scatter
from ..parts.tensor import StepInfo, TensorSpec

OPS = TorchOps("cpu")


@dataclass
class Sent:
    """Holds what one rank sent of one tensor at one step: the bytes of all its rounds, and what the compressor's state was before."""

    compressor: Compressor
    spec: TensorSpec
    info: StepInfo
    state: dict[str, np.ndarray]
    payload: list[np.ndarray]

    def observed(self) -> Observed:
        """Returns what the payload says of the gradient, in torch tensors; the operator can be differentiated."""
        pieces = self.payload[: len(self.compressor.fields(self.spec))]  # some memories send twice in a step: first what is new
        payload = tuple(torch.empty(len(piece), dtype=torch.uint8).copy_(torch.from_numpy(piece)) for piece in pieces)
        state = {key: torch.from_numpy(array) for key, array in self.state.items()}
        return self.compressor.observed(OPS, payload, self.spec, self.info, state)


class _Tap:
    """Copies the bytes of the requests of one tensor."""

    closely = False

    def __init__(self, tapped: dict[str, Sent], info: Callable[[], StepInfo]):
        self._tapped, self._info = tapped, info

    def through(self, ops: Ops, job: Job, exchange: Generator[Any, Any, Outcome]) -> Generator[Any, Any, Outcome]:
        """Runs the exchange of the tensor, and keeps what it sends."""
        info = self._info()
        start = {key: job.state.get(key, array) for key, array in job.compressor.init(ops, job.spec, info).items()}
        state = {key: np.array(ops.host(array)) for key, array in start.items()}
        sent = self._tapped[job.spec.name] = Sent(job.compressor, job.spec, info, state, [])
        answer = None
        while True:
            try:
                request = exchange.send(answer)
            except StopIteration as stop:
                return stop.value
            sent.payload += _bytes(ops, job, request)
            answer = yield request

    def sent(self, x: float, error: float) -> None:
        """Measures nothing."""


def _bytes(ops: Ops, job: Job, request: Any) -> list[np.ndarray]:
    """Returns the pieces of the payload that a request sends. Raises UnsupportedError if they are no pieces of this rank's payload."""
    if isinstance(request, Scatter) or (isinstance(request, AllReduce) and job.compressor.result == "vote"):
        raise _in_pieces(job.communicator)
    if isinstance(request, Gather):
        return [np.array(ops.host(piece)) for piece in request.payload]
    if isinstance(request, AllReduce):
        host = ops.host(request.array)
        narrow = host.dtype == np.uint8
        return [np.array(host if narrow else ops.host(ops.to_bytes(request.array, request.dtype)))]
    return []  # what a tensor asks of its own bucket does not travel


def _in_pieces(communicator: Communicator) -> UnsupportedError:
    name = communicator.name
    return UnsupportedError(
        f"communicator {name!r} does not send a rank's payload in one piece, and payloads are what is attacked: leave out '@ {name}'. "
        "Somebody who sees all of a rank's messages learns the same with any communicator"
    )


class _Eavesdropper(Observer):
    """Taps one driver. A tensor that is tapped is not merged with others, which changes no byte of it."""

    def __init__(self) -> None:
        self.tapped: dict[str, Sent] = {}
        self._now: StepInfo | None = None

    def begin(self, info: StepInfo) -> None:
        self._now = info

    def watch(self, name: str) -> Watch:
        return _Tap(self.tapped, self._step)

    def _step(self) -> StepInfo:
        assert self._now is not None
        return self._now


@dataclass(frozen=True)
class Leak:
    """Holds what one step gave away. decoded: the gradients that the payloads decode to. sent: the payloads."""

    decoded: dict[str, torch.Tensor]
    sent: dict[str, Sent]

    @cached_property
    def observed(self) -> dict[str, Observed]:
        """What the payloads say of the gradients that were compressed."""
        return {name: sent.observed() for name, sent in self.sent.items()}

    @property
    def says_more(self) -> bool:
        """Whether to know the operators helps: whether some payload does not have a value for every element."""
        return any(seen.operator is not whole for seen in self.observed.values())


class ObservedRank:
    """One rank that trains with a spec, and whose messages are read. It is alone, so that its messages are its own and no sums."""

    def __init__(self, spec: making.Spec):
        grace = making.grace(spec)
        for leaf in grace.leaves:
            if leaf.communicator.two_level:
                raise _in_pieces(leaf.communicator)
        self.cluster = LocalCluster(grace, 1, framework="torch")
        #: Whether `step` takes the gradients of the examples, one by one, because each of them is made private.
        self.per_example = grace.per_example
        self._eavesdropper = _Eavesdropper()
        self.cluster.drivers[0].observe(self._eavesdropper)

    def step(self, gradients: Mapping[str, torch.Tensor], lr: float | None = None) -> Leak:
        """Makes one exchange, and returns what it gave away of the gradients that were compressed."""
        tapped = self._eavesdropper.tapped = {}
        copies = {name: gradient.detach().clone() for name, gradient in gradients.items()}
        result = self.cluster.step([copies], lr=lr)
        decoded = result[0] if isinstance(result, list) else result
        return Leak(dict(decoded), tapped)
