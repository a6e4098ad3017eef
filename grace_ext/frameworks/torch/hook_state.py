"""`HookState`: what the states of the hooks of torch's own wrappers (DDP in ddp.py, FSDP2 in fsdp.py) have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.saveable import Saveable
from ...composition.grace import Grace
from ...driver.driver import Driver
from ...errors import UnsupportedError
from ...metrics.metrics import Measured
from ..optimizers import rate_of
from .dcp import refuse_dcp
from .session import Session, check_torch_optimizer


class HookState(Measured):
    """The exchange of one model on this rank, which hooks in its backward pass start.

    `state_dict()` and `load_state_dict()` hold the memory and compressor state, which differs by rank: save every rank's. `wire_bytes`,
    `measure(...)` and `metrics()` say what was sent.
    """

    #: The public function that makes this state.
    MAKER = ""

    def __init__(self, g: Grace, optimizer: Any, scaler: Any, revocable: bool, check_start: bool):
        self._grace, self._optimizer, self._scaler = g, optimizer, scaler
        self._revocable, self._check_start = revocable, check_start
        self._made: Session | None = None

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank handed to collectives in the last step: payloads, headers, all rounds. 0 if nothing is compressed."""
        return self._made.wire_bytes if self._made else 0

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's state, with torch tensors by 'kind/parameter' under 'state'."""
        refuse_dcp("the memory of compression", "pass hvd.DistributedState(state) instead")
        return self._session().state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit from what `state_dict` returned. Raises GraceError if the state does not fit."""
        self._session().load_state_dict(saved)

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, as Driver.epsilon does."""
        return self._session().driver.epsilon(delta)

    def undo(self) -> None:
        """Takes the last step's exchange back, for a step that shall be skipped: the memory becomes what it was. Every rank must call it
        before the next backward pass; if only some do, all raise an error at the next step. Needs revocable=True."""
        if not self._revocable:
            raise UnsupportedError(f"undo() needs the memory before the last step: pass revocable=True to {self.MAKER}")
        self._session().undo()

    def _saveable(self) -> Saveable:
        return self._session().saveable()

    def _session(self) -> Session:
        raise NotImplementedError

    def _tensors(self) -> Mapping[str, torch.Tensor]:
        """Returns this rank's parameters, by name, which ranks that exchange gradients compare."""
        raise NotImplementedError

    def _drivers(self) -> list[Driver]:
        return [self._made.driver] if self._made else []

    def _read_lr(self) -> float | None:
        if self._optimizer is not None and not isinstance(self._optimizer, torch.optim.Optimizer):
            self._optimizer = self._optimizer()
            check_torch_optimizer(self._grace, self._optimizer)
        return None if self._optimizer is None else rate_of(self._optimizer.param_groups)
