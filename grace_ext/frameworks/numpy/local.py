"""Defines `LocalSGD` over MPI, for any array code: ranks make local steps, and from time to time exchange how far their models moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...arrays.compiled import host_ops
from ...arrays.numpy import NumpyOps
from ...errors import GraceError, NamesError, shown
from ...local.settings import settings_of
from ...local.worker import Worker
from ...parts.tensor import TensorSpec
from .mpi import MpiTransport, check_by_name, duplicated


class LocalSGD:
    """Trains by local updates over an MPI communicator. Each rank makes one such object.

        local = gnp.LocalSGD("topk(ratio=0.01) > qsgd(bits=4) + residual", every=8)
        weights = local.start(weights)
        for ...:
            gradients = local.gradients({"w": gradient_w})     # only if they are exchanged: post_local, cser, every=1 without loss
            weights = {"w": weights["w"] - lr * gradients["w"]}
            weights = local.step(weights)

    The algorithm and the options are those of grace_ext.frameworks.torch.LocalSGD; comm and simulate as for Exchange. All ranks must start
    from the same weights. At the end every rank calls `sync`, so that all have the same model. The communicator is duplicated, so making
    this object is collective.
    """

    def __init__(self, compression: Any = None, comm: Any = None, *, simulate: bool = False, **options: Any):
        self.settings = settings_of(compression, **options)
        self._lr: float | None = None
        self._transport = MpiTransport(host_ops(NumpyOps), duplicated(comm))
        self._alone = self._transport.size == 1 and not simulate
        self._worker = Worker(self.settings, self._transport.ops, self._transport, lambda: self._lr)
        self._in_step = False

    def start(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the weights before the first step, the same on all ranks, and returns copies, in this machine's byte order. Collective.
        Raises DisagreementError if ranks differ."""
        check_by_name(weights, "start")
        ops = self._transport.ops
        if not self._alone:
            self._worker.begin([TensorSpec(name, *ops.describe(array)) for name, array in weights.items()], weights)
        return {name: ops.emit(ops.copy(ops.ingest(w)), TensorSpec(name, *ops.describe(w))) for name, w in weights.items()}

    def gradients(self, gradients: Mapping[str, Any], lr: float | None = None) -> Mapping[str, Any]:
        """Returns the gradients that this rank applies in the step that begins: its own or, if the step exchanges gradients, their
        aggregates. `lr` is for a memory that uses it (cser)."""
        check_by_name(gradients, "gradients")
        self._lr = lr
        if self._alone or not self._begin_step():
            return gradients
        return self._worker.exchange_gradients(gradients)

    def step(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """Takes the weights after this rank's own step; returns what they become. Raises RankLeftError, TensorChangedError, NamesError."""
        check_by_name(weights, "step")
        if self._alone:
            return weights
        if not self._in_step and self._begin_step():
            raise GraceError(
                "this step exchanges gradients (post_local, cser, or every=1 without loss): call gradients(...) before step(...)"
            )
        self._in_step = False
        if set(weights) != set(self._worker.model.specs):
            names = sorted(self._worker.model.specs)
            raise NamesError(
                f"the weights are {shown(sorted(weights))}, but they started as {shown(names)}; pass the same names at every step"
            )
        new = self._worker.models(weights)
        return weights if new is None else new

    def sync(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """Synchronizes now. Every rank calls it, unless asynchronous after the same number of steps."""
        check_by_name(weights, "sync")
        new = None if self._alone else self._worker.sync(weights)
        return weights if new is None else new

    def _begin_step(self) -> bool:
        if not self._worker.model.begun:
            raise GraceError("call start(weights) before the first step")
        self._in_step = True
        return self._worker.begin_step()

    @property
    def wire_bytes(self) -> int:
        """Returns the bytes that this rank sent in the last step, including the meeting of the ranks before an exchange."""
        return 0 if self._alone else self._worker.wire_bytes

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's master copy, memory and step. Those of every rank are needed to resume, with every rank's weights."""
        return self._worker.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit. Raises GraceError, and changes nothing, if it does not fit."""
        self._worker.load_state_dict(saved)
