"""`LocalSGD`: a torch optimizer that makes local steps, and from time to time exchanges how far the model has moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.saveable import Saveable, nothing_saveable
from ...errors import GraceError, NamesError, UnsupportedError
from ...local.settings import Settings, settings_of
from ...local.worker import Worker
from ...parts.tensor import TensorSpec
from ..optimizers import rate_of
from . import engine
from .ops import describe, ops_for
from .session import check_none_new, check_torch_optimizer, named

api = engine.api


def LocalSGD(  # noqa: N802 (the algorithm's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Any = None,
    compression: Any = None,
    *,
    every: int | None = None,
    schedule: Any = None,
    max_gap: int | None = None,
    asynchronous: bool = False,
    max_ahead: int = 1000,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    timeout: float = 300.0,
    process_set: Any = api.global_process_set,
    simulate: bool = False,
) -> LocalOptimizer:
    """Wraps an optimizer for local-update training: `step()` applies this rank's own gradients, and at some steps the ranks synchronize:
    they exchange how far their models have moved.

    Qsparse-local-SGD (Basu et al. 2019): at a synchronization every rank sends C(m + x - y), where x is the last common model, y its own
    model and m the residual of its memory, and all continue from x minus the mean of what was sent. Momentum and other optimizer state
    belong to each rank and are not averaged, nor are buffers such as BatchNorm's statistics. All ranks must start from the same model
    (hvd.broadcast_parameters); the first step checks it.

    optimizer: any torch optimizer. The result shares its parameter groups and state, and is of its class, so schedulers work.
    named_parameters: model.named_parameters(); it must name every parameter of the optimizer that trains. None numbers the parameters.
    compression: a Grace or a spec string; None sends everything.
    every: the number of local steps between two synchronizations, by default 8.
    schedule: replaces `every`: post_local(start, every), an increasing sequence of steps, or a function of the step (counted from 1).
    max_gap: the most steps between two synchronizations; a function as schedule needs it, and a sequence must keep it.
    asynchronous: ranks send when their own schedule says, and wait for nobody; the messages are averaged as they arrive (algorithm 2).
    max_ahead: an asynchronous rank waits only if it is more than max_ahead steps ahead of the slowest rank.
    outer_lr, outer_momentum: Nesterov momentum on the mean drift (DiLoCo: 0.7 and 0.9).
    timeout: seconds to wait for a silent rank, after which the others raise RankLeftError; if a rank has left, they raise it at once.
    process_set: the ranks that take part.
    simulate: True compresses at world size 1 too; otherwise a single rank just trains.

    With the memory 'cser' the ranks exchange gradients at every step and reset errors every `reset_period` steps; the optimizer must be
    SGD without momentum and weight decay.

    Beyond the wrapped optimizer the result has `sync()`, which every rank calls at the end and before a checkpoint, and after which all
    have the same model; `wire_bytes`, the bytes that this rank sent in the last step; and `state_dict()['grace_ext']`, which resumes bit
    for bit together with every rank's own parameters.
    """
    settings = settings_of(
        compression, every=every, schedule=schedule, max_gap=max_gap, asynchronous=asynchronous, max_ahead=max_ahead, outer_lr=outer_lr,
        outer_momentum=outer_momentum, timeout=timeout,
    )  # fmt: skip
    check_torch_optimizer(settings.grace, optimizer)
    cls: Any = type(type(optimizer).__name__, (LocalOptimizer, type(optimizer)), {"__module__": __name__})
    wrapped: LocalOptimizer = cls.__new__(cls)
    wrapped.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key not in ("step", "zero_grad")})
    wrapped._begin(settings, named_parameters, process_set, simulate)
    return wrapped


class LocalOptimizer(torch.optim.Optimizer):
    """The optimizer that `LocalSGD` returns. Its class derives from this one and, after it, from the wrapped optimizer's class; it shares
    the wrapped optimizer's parameter groups and state."""

    def _begin(self, settings: Settings, named_parameters: Any, process_set: Any, simulate: bool) -> None:
        self._worker: Worker | None = None
        self._takes_part = process_set.included()
        if not process_set.included() or (process_set.size() == 1 and not simulate):
            return
        own = {id(p) for group in self.param_groups for p in group["params"] if p.requires_grad}
        if named_parameters is None:
            flat = [p for group in self.param_groups for p in group["params"]]
            named_parameters = [(f"parameter.{i}", p) for i, p in enumerate(flat)]
        self._parameters = {name: p for name, p in named(named_parameters).items() if id(p) in own}
        if len(self._parameters) < len(own):
            raise NamesError(f"named_parameters lacks {len(own) - len(self._parameters)} of the optimizer's {len(own)} parameters")
        self._ops = ops = ops_for(next(iter(self._parameters.values())).device)
        transport = engine.transport(ops, process_set)
        self._fresh = lambda: Worker(settings, ops, transport, lambda: rate_of(self.param_groups))
        self._worker = self._fresh()

    def step(self, closure: Any = None) -> Any:
        """Makes a step of the wrapped optimizer and, if one is due, a synchronization. Raises RankLeftError."""
        worker = self._worker
        if worker is None:
            return super().step(closure)
        if not worker.model.begun:
            worker.begin([TensorSpec(name, *describe(p)) for name, p in self._parameters.items()], self._values())
        check_none_new(self, self._parameters.values())
        if closure is not None and worker.model.exchanges_gradients():
            raise UnsupportedError(
                "a closure computes gradients inside step(), after their exchange; call backward(), then step() without a closure"
            )
        self._exchange_gradients(worker)
        loss = super().step(closure)
        self._take(worker.models(self._values()))
        return loss

    def sync(self) -> None:
        """Synchronizes now, after which all ranks have the same model. Every rank must call it; synchronous ranks after equally many
        steps."""
        if self._worker is not None:
            check_none_new(self, self._parameters.values())
            self._take(self._worker.sync(self._values()))

    def _exchange_gradients(self, worker: Worker) -> None:
        if not worker.begin_step():
            return
        own = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self._parameters.items()}
        sparse = [name for name, gradient in own.items() if gradient.is_sparse]
        if sparse:
            raise UnsupportedError(
                f"the gradient of {sparse[0]!r} is sparse, and this step averages dense gradients; use Embedding(sparse=False)"
            )
        for name, result in worker.exchange_gradients(own).items():
            self._parameters[name].grad = result

    @torch.no_grad()
    def _take(self, new: Mapping[str, torch.Tensor] | None) -> None:
        for name, value in (new or {}).items():
            self._parameters[name].copy_(value)

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self._parameters.items()}

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, including the meeting of the ranks before an exchange."""
        return self._worker.wire_bytes if self._worker else 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state_dict and, under 'grace_ext', this rank's master copy, memory and step. Both differ by rank:
        save every rank's."""
        saved = super().state_dict()
        if self._worker is None:
            return saved
        return {**saved, "grace_ext": _mapped(self._worker.state_dict(), self._ops.as_torch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned. Without a 'grace_ext' entry local training starts anew, from the model at the next step."""
        own = state_dict.get("grace_ext")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grace_ext"})
        if self._worker is not None and own is None:
            self._worker = self._fresh()
        elif self._worker is not None and own is not None:
            if "model" not in own:
                raise GraceError(
                    "this state was saved by a DistributedOptimizer, not by LocalSGD; leave out its 'grace_ext' entry to start anew"
                )
            device = next(iter(self._parameters.values())).device
            self._worker.load_state_dict(_mapped(own, lambda tensor: self._ops.from_torch(tensor.to(device))))

    def _saveable(self) -> Saveable:
        return self._worker.saveable() if self._worker else nothing_saveable(self._takes_part)


def _mapped(saved: Mapping[str, Any], convert: Any) -> dict[str, Any]:
    """Returns a worker's state with its arrays converted. They are saved as tensors, which `torch.load` reads without pickle."""

    def one(of: Mapping[str, Any], key: str) -> dict[str, Any]:
        return {**of, key: {name: convert(array) for name, array in of[key].items()}}

    return {"model": one(saved["model"], "arrays"), "gradients": one(saved["gradients"], "state"), "models": one(saved["models"], "state")}
