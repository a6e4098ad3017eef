"""`LocalSGD`: a torch optimizer that makes local steps, and from time to time exchanges how far the model has moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.saveable import Saveable, nothing_saveable
from ...checkpoints.statefile import mapped
from ...errors import GraceError, NamesError, UnsupportedError
from ...local.settings import Settings, settings_of
from ...local.worker import Worker
from ...parts.tensor import TensorSpec
from ..optimizers import rate_of
from . import engine
from .dcp import OfOneRank, refuse_dcp
from .devices import ops_for
from .guards import check_alone, check_containers, check_optimizer_kind, check_parameters
from .in_front import InFront, in_front_of
from .ops import describe
from .session import check_none_new, check_torch_optimizer

api = engine.api
DIFFERS = "what LocalSGD trains"
INSTEAD = "pass hvd.DistributedState(optimizer) instead of the optimizer, which keeps every rank's parameters and momenta"


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
    compression: a Grace or a spec string; None sends everything. A step of a policy is a synchronization.
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
    check_optimizer_kind(optimizer, "LocalSGD")
    check_torch_optimizer(settings.grace, optimizer)
    local = _Local(settings, _named(optimizer, named_parameters), process_set, simulate, lambda: rate_of(optimizer.param_groups))
    wrapped = in_front_of(optimizer, LocalOptimizer)
    wrapped._local = local
    return wrapped


def _named(optimizer: torch.optim.Optimizer, named_parameters: Any) -> dict[str, torch.nn.Parameter]:
    """Returns the optimizer's parameters that train, by name. Raises NamesError if one of them has no name."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if named_parameters is None:
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        named_parameters = [(f"parameter.{i}", p) for i, p in enumerate(flat)]
    parameters = {name: p for name, p in check_parameters(named_parameters).items() if id(p) in own}
    if len(parameters) < len(own):
        raise NamesError(f"named_parameters lacks {len(own) - len(parameters)} of the optimizer's {len(own)} parameters")
    return parameters


class _Local:
    """This rank's worker, and the parameters that it exchanges. It is shared by all objects that have a copy of the optimizer's attributes.
    `worker` is None if nothing is exchanged."""

    def __init__(self, settings: Settings, parameters: dict[str, torch.nn.Parameter], process_set: Any, simulate: bool, read_lr: Any):
        self.worker: Worker | None = None
        self.parameters, self.takes_part = parameters, process_set.included()
        self._settings, self._read_lr = settings, read_lr
        if not self.takes_part:
            return
        if process_set.size() == 1:
            if process_set is api.global_process_set:
                check_alone(engine.ENGINE)
            if not simulate:
                return
        self._ranks = process_set.ranks
        self.check_containers()
        self.ops = ops_for(next(iter(parameters.values())).device)
        self._transport = engine.transport(self.ops, process_set)
        self.begin_anew()

    def check_containers(self) -> None:
        check_containers(self.parameters, "LocalSGD", self._ranks)

    def converted(self, saved: Any) -> Any:
        """Returns a worker's state, saved as tensors, with arrays of this exchange's library and device."""
        device = next(iter(self.parameters.values())).device

        def own(array: Any) -> Any:
            try:
                return self.ops.from_torch(torch.as_tensor(array).detach().to(device))
            except (TypeError, ValueError, RuntimeError):  # Worker.check_state says by name what is wrong with it
                return array

        return mapped(saved, own)

    def begin_anew(self) -> None:
        """Makes a worker that has made no step."""
        self.worker = Worker(self._settings, self.ops, self._transport, self._read_lr)


class LocalOptimizer(InFront):
    """The optimizer that `LocalSGD` returns. Its class derives from this one and, after it, from the wrapped optimizer's class; it shares
    the wrapped optimizer's parameter groups and state."""

    _local: _Local

    def step(self, closure: Any = None, **options: Any) -> Any:
        """Makes a step of the wrapped optimizer and, if one is due, a synchronization. Raises RankLeftError.

        closure: computes the loss and its gradients. options: passed on to the wrapped optimizer."""
        refuse_dcp(DIFFERS, INSTEAD)
        self._mark_step()
        arguments = () if closure is None else (closure,)
        worker = self._local.worker
        if worker is None:
            return super().step(*arguments, **options)
        if not worker.model.begun:
            self._local.check_containers()
            worker.begin([TensorSpec(name, *describe(p)) for name, p in self._local.parameters.items()], self._values())
        check_none_new(self, self._local.parameters.values())
        if closure is None or not worker.model.exchanges_gradients():
            self._exchange_gradients(worker)
            loss = super().step(*arguments, **options)
        else:
            calls = []

            def evaluate() -> Any:
                calls.append(1)
                with torch.enable_grad():
                    loss = closure()
                self._exchange_gradients(worker)
                return loss

            loss = super().step(evaluate, **options)
            if len(calls) != 1:
                raise GraceError(
                    f"{type(self).__name__}.step() called its closure {len(calls)} times, and {worker.settings} exchanges "
                    "the gradients of one evaluation in this step: call backward(), and step() without a closure"
                )
        self._take(worker.models(self._values()))
        return loss

    def sync(self) -> None:
        """Synchronizes now, after which all ranks have the same model. Every rank must call it; synchronous ranks after equally many
        steps."""
        if self._local.worker is not None:
            check_none_new(self, self._local.parameters.values())
            self._take(self._local.worker.sync(self._values()))

    def _exchange_gradients(self, worker: Worker) -> None:
        if not worker.begin_step():
            return
        parameters = self._local.parameters
        own = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        sparse = [name for name, gradient in own.items() if gradient.is_sparse]
        if sparse:
            raise UnsupportedError(
                f"the gradient of {sparse[0]!r} is sparse, and this step averages dense gradients; use Embedding(sparse=False)"
            )
        for name, result in worker.exchange_gradients(own).items():
            parameters[name].grad = result

    @torch.no_grad()
    def _take(self, new: Mapping[str, torch.Tensor] | None) -> None:
        for name, value in (new or {}).items():
            self._local.parameters[name].copy_(value)

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self._local.parameters.items()}

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step, including the meeting of the ranks before an exchange."""
        return self._local.worker.wire_bytes if self._local.worker else 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state_dict and, under 'grace_ext', this rank's master copy, memory and step. Both differ by rank:
        save every rank's."""
        refuse_dcp(DIFFERS, INSTEAD)
        saved = super().state_dict()
        if self._local.worker is None:
            return saved
        return {**saved, "grace_ext": OfOneRank(mapped(self._local.worker.state_dict(), self._local.ops.as_torch))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned. Without a 'grace_ext' entry local training starts anew, from the model at the next step."""
        local, own = self._local, state_dict.get("grace_ext")
        if local.worker is not None and own is not None:
            own = local.converted(own)
            local.worker.check_state(own)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grace_ext"})
        if local.worker is not None and own is None:
            local.begin_anew()
        elif local.worker is not None and own is not None:
            local.worker.load_state_dict(own)

    def _saveable(self) -> Saveable:
        return self._local.worker.saveable() if self._local.worker else nothing_saveable(self._local.takes_part)
