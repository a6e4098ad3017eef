"""Runs one rank of local-update training over a real engine: the model, its exchanges, and the connection to the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checkpoints.saveable import Saveable, saveable_by
from ..driver.agreement import agree, share
from ..driver.driver import Driver
from ..errors import DisagreementError, GraceError, shown
from ..exchange.perform import perform
from ..exchange.transport import Transport
from ..parts.ops import Ops
from ..parts.tensor import TensorSpec
from .connection import Connection
from .messages import Messages
from .model import LocalModel
from .server import Server, address
from .settings import Settings


class Worker:
    """Runs one rank. Call `begin_step` and, if it returns true, `exchange_gradients` before the optimizer's step, and `models` after it;
    call `sync` at the end.

    A framework that runs drivers in another way (TensorFlow's graphs) calls the parts of these methods.
    """

    def __init__(self, settings: Settings, ops: Ops, transport: Transport, read_lr: Callable[[], float | None] = lambda: None):
        self.settings, self.ops, self.transport = settings, ops, transport
        self.model = LocalModel(settings, ops)
        self.messages = Messages(self.model, transport.rank, transport.size) if settings.asynchronous else None
        self.for_gradients = Driver(settings.for_gradients, ops, transport, read_lr=read_lr, diverging=True)
        self.for_models = self.messages.driver if self.messages else Driver(settings.for_models, ops, transport)
        self._connection: Connection | None = None
        self._meetings = self._sent = 0  # the meetings so far; the bytes that the connection had sent before this step
        self._used: list[Driver] = []  # the drivers that exchanged in this step
        self._together = True  # whether no asynchronous rank has messages that others have not had

    # --- the first step ---------------------------------------------------------------------------------------------
    def begin(self, specs: Sequence[TensorSpec], values: Mapping[str, Any]) -> None:
        """Begins, on every rank before the first step. Raises DisagreementError on all ranks if settings, parameters or models differ."""
        loaded = bool(self.model.master)
        self.model.begin(specs, values)
        mine = {
            "spec": str(self.settings), "seed": self.settings.grace.seed, "number": 0,
            "parameters": [[s.name, list(s.shape), s.dtype] for s in specs],
        }  # fmt: skip
        try:
            self.for_gradients.register(specs)
            self.for_models.register(self.model.drift_specs)
            perform(agree(self.ops, self.transport, mine), self.transport, {})
            self._connect()
            if self.messages:
                self.for_models.log_notices()
        except BaseException:  # nothing has begun, so that the caller may try again
            self.model.specs = {}
            if not loaded:
                self.model.master = {}
            raise

    def _connect(self) -> None:
        """Starts the server on rank 0, shares its address, compares the ranks' models, and connects. Raises DisagreementError."""
        server = Server(self.transport.size, self.settings.timeout, self.settings.max_ahead) if self.transport.rank == 0 else None
        mine = {"model": self.model.digest(), **(address(server) if server else {})}
        said = perform(share(self.ops, self.transport, mine), self.transport, {})
        differing = [rank for rank, other in enumerate(said) if other["model"] != said[0]["model"]]
        if differing:
            raise DisagreementError(
                f"ranks {differing} start from another model than rank 0. Give all ranks the same model before the first step: "
                "hvd.broadcast_parameters(model.state_dict(), root_rank=0); for Keras build the model before fit (an Input layer), and "
                "pass hvd.callbacks.BroadcastGlobalVariablesCallback(0)",
                said,
            )
        self._connection = Connection(self.transport.rank, said[0], self.settings.timeout)

    # --- steps ------------------------------------------------------------------------------------------------------
    def begin_step(self) -> bool:
        """Begins a step; returns whether its gradients are exchanged, for which it has waited for all ranks. Raises RankLeftError."""
        assert self._connection is not None
        self._used, self._sent = [], self._connection.sent
        exchanged = self.model.exchanges_gradients()
        if exchanged:
            self.meet(self.for_gradients)
        return exchanged

    def exchange_gradients(self, gradients: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the optimizer has to apply instead of these gradients, if `begin_step` returned true."""
        return self._exchange(self.for_gradients, gradients)

    def end_step(self, values: Callable[[], Mapping[str, Any]]) -> bool:
        """Ends a step, after the optimizer's step; returns whether to synchronize now."""
        what = self.model.advance()
        if what == "rebase":
            self.model.rebase(values())
        return what == "synchronize"

    def models(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Takes the parameters after the optimizer's step; returns the new ones, None if they stay. Raises RankLeftError."""
        return self.synchronize(values) if self.end_step(lambda: values) else None

    def synchronize(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Exchanges drifts; returns the new parameters, None if they stay. Raises RankLeftError."""
        if self.messages:
            return self.post(values)
        self.meet(self.for_models)
        means = self._exchange(self.for_models, self.model.outgoing(values))
        return self.model.incoming(means, self.for_models.committed)

    def sync(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Synchronizes now, on every rank, so that all have the same model; returns it, None if they have it already."""
        if not self.model.begun:
            return None
        if self.messages:
            return self.post(values, gather=True)
        if self.model.together:
            return None
        new = self.synchronize(values)
        if self.settings.diverges and self.for_models.committed:
            # CSER: the mean of the models contains everything that was not sent.
            self.for_gradients.clear_state(self.settings.for_gradients.memory.unsent_key)
        return new

    def post(self, values: Mapping[str, Any], gather: bool = False) -> dict[str, Any]:
        """Sends this rank's drift (asynchronous), and applies what others have sent; with `gather` it first waits until all ranks do so."""
        assert self._connection is not None and self.messages is not None
        self._together = False
        number = self.for_models.step
        message = self.messages.encode(values)
        new = self.messages.apply(self._connection.post(number, self.model.step, message, gather))
        self._together = gather
        return new

    def meet(self, driver: Driver) -> None:
        """Waits for all ranks before they exchange by this driver. Raises RankLeftError."""
        assert self._connection is not None
        self._used.append(driver)
        self._connection.meet(self._meetings, self.model.step, "models" if driver is self.for_models else "gradients")
        self._meetings += 1

    def _exchange(self, driver: Driver, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return perform(driver.exchange(tensors), self.transport, {})

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, to collectives and to the server."""
        return sum(driver.wire_bytes for driver in self._used) + (self._connection.sent - self._sent if self._connection else 0)

    # --- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Returns {'model': LocalModel.state_dict(), 'gradients': ..., 'models': Driver.state_dict() of both exchanges} of this rank."""
        if not self._together:
            raise GraceError("asynchronous ranks have messages under way, which no rank's state contains: call sync() on all ranks before")
        return {
            "model": self.model.state_dict(), "gradients": self.for_gradients.state_dict(), "models": self.for_models.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit, if the parameters are those of the same moment. Raises GraceError if the state does not fit."""
        self.check_state(saved)
        self.model.load_state_dict(saved["model"])
        self.for_gradients.load_state_dict(saved["gradients"])
        self.for_models.load_state_dict(saved["models"])

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raises GraceError if `load_state_dict` would; changes nothing."""
        if not isinstance(saved, Mapping) or not {"model", "gradients", "models"} <= set(saved):
            raise GraceError(
                f"this state is not of LocalSGD, which saves 'model', 'gradients' and 'models', but {shown(saved, 80)} (that of a "
                "DistributedOptimizer?); leave it out to start anew"
            )
        self.model.read_state(saved["model"])
        self.for_gradients.read_state(saved["gradients"])
        self.for_models.read_state(saved["models"])

    def saveable(self) -> Saveable:
        """Returns what grace_ext.save and load need."""
        return saveable_by(self.transport, self.state_dict, self.check_state, self.load_state_dict)
