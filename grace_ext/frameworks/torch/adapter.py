"""The `compression=` object for the unmodified `horovod.torch.DistributedOptimizer`.

Horovod guarantees only this: it calls `compress(gradient)` once per parameter and step (from backward hooks, in any order), all-reduces
the tensor that it gets, and, after all `compress` calls of the step, calls `decompress(result, ctx)`. So `compress` hands the gradient to
the driver, which starts named collectives of its own, and returns one element for Horovod to reduce; the first `decompress` of a step
finishes the exchange. Horovod does not say which parameter a tensor belongs to: it is found by identity with `parameter.grad`, or, for a
sparse gradient made dense, by the parameter whose hook ran last.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ...checkpoints.saveable import Saveable
from ...composition.grace import Grace
from ...driver.driver import Driver
from ...errors import NamesError, UnboundError, UnsupportedError
from ...metrics.metrics import Measured
from ...privacy.settings import refuse
from ..optimizers import rate_of, require_optimizer
from .guards import check_parameters
from .session import Session, check_torch_optimizer, require_sum_or_mean
from .transports import HorovodTransport, SingleTransport


def bind(
    g: Grace, pairs: list[Any], *, optimizer: Any, op: Any, process_set: Any, simulate: bool, scaler: Any, check_start: bool
) -> BoundCompression:
    """Returns the `compression=` object for these (name, parameter) pairs; see Grace.bind for the options."""
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UnsupportedError(
            "bind is for unmodified horovod.torch, which is not installed here; use `import grace_ext.frameworks.torch as hvd`"
        ) from error
    refuse(g.privacy, "bind")
    parameters = check_parameters(pairs)
    require_optimizer(g, optimizer, "bind")
    check_torch_optimizer(g, optimizer)
    if optimizer is not None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = {name: p for name, p in parameters.items() if id(p) in trained}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    if not parameters:
        raise NamesError("none of these parameters requires a gradient (and is in the optimizer); bind model.named_parameters()")
    if simulate and optimizer is None:
        raise UnboundError("simulate=True needs optimizer=: at world size 1 Horovod never calls a compression object")
    average = require_sum_or_mean(op, hvd)
    return BoundCompression(g, parameters, hvd, average, process_set or hvd.global_process_set, optimizer, simulate, scaler, check_start)


class BoundCompression(Measured):
    """One model's compression, made by Grace.bind. It is compared and hashed by identity, because it holds that model's memory."""

    def __init__(
        self, g: Grace, parameters: dict, hvd: Any, average: bool, process_set: Any, optimizer: Any, simulate: bool, scaler: Any,
        check_start: bool,
    ):  # fmt: skip
        self.grace = g
        self._parameters, self._hvd, self._process_set, self._average = parameters, hvd, process_set, average
        self._optimizer, self._scaler, self._check_start = optimizer, scaler, check_start
        self._session: Session | None = None
        self._results: dict[str, torch.Tensor] | None = None
        self._put: set[str] = set()
        self._order = list(parameters)
        self._last_hooked: str | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._remember(name)) for name, p in parameters.items()]
        self._simulate = simulate
        if simulate or (g.acts_alone and optimizer is not None):
            self._hooks.append(_exchange_alone(self))

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank handed to grace_ext's collectives in the last step, without Horovod's own one-element all-reduces."""
        return self._session.wire_bytes if self._session else 0

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        """Starts the exchange of this gradient. Returns one element, which Horovod all-reduces in its place, and the parameter's name.
        Horovod calls it."""
        if self._process_set.size() == 1:
            return tensor, None
        name = self._name_of(tensor)
        self._put.add(name)
        self._results = None
        self._get_session().put(name, tensor)
        return tensor.new_zeros(1), name

    def decompress(self, tensor: torch.Tensor, ctx: str | None) -> torch.Tensor:
        """Returns the aggregate. ctx: the name that `compress` returned; None for a tensor that was not compressed (sparse gradients,
        world size 1). Horovod calls it."""
        if ctx is None:
            return tensor
        if self._results is None:
            self._put.clear()
            self._results = self._get_session().finish(self._parameters)
        return self._results.pop(ctx)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's memory, which Horovod's optimizer does not save: save it beside the optimizer's own state_dict, on every
        rank."""
        return self._get_session().state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit from what `state_dict` returned. Raises GraceError if the state does not fit."""
        self._get_session().load_state_dict(saved)

    def _saveable(self) -> Saveable:
        return self._get_session().saveable()

    def _get_session(self) -> Session:
        if self._session is None:  # made at first use, because Horovod may be initialized after bind
            alone = self._process_set.size() == 1
            self._session = Session(
                self.grace,
                self._parameters,
                lambda ops: SingleTransport(ops) if alone else HorovodTransport(ops, self._hvd, self._process_set),
                wrapper="DistributedOptimizer",
                average=self._average,
                read_lr=lambda: rate_of(self._optimizer.param_groups) if self._optimizer is not None else None,
                scaler=self._scaler,
                check_start=self._check_start,
                compressing=self._simulate or not alone,
            )
            self._attach(self._session.driver)
        return self._session

    def _drivers(self) -> list[Driver]:
        return [self._session.driver] if self._session else []

    # --- which parameter is it? -------------------------------------------------------------------------------------
    def _remember(self, name: str) -> Any:
        this = weakref.ref(self)

        def hook(_: torch.Tensor) -> None:
            if (own := this()) is not None:
                own._last_hooked = name
                own._check_alone()

        return hook

    def _check_alone(self) -> None:
        if self.grace.acts_alone and self._optimizer is None and self._process_set.size() == 1:
            raise UnboundError(
                f"at world size 1 Horovod never calls a compression object, so {self.grace} would have no effect, and its results are no "
                "gradients; use bind(..., optimizer=...), or train one rank without compression"
            )

    def _name_of(self, tensor: torch.Tensor) -> str:
        # The order of the last step is the best guess, and saves a search over all parameters for each gradient.
        place = len(self._put)
        if place < len(self._order) and self._parameters[self._order[place]].grad is tensor:
            return self._order[place]
        for name, parameter in self._parameters.items():
            if parameter.grad is tensor:
                self._order = [n for n in self._order if n != name]
                self._order.insert(place, name)
                return name
        return self._sparse_name_of(tensor)

    def _sparse_name_of(self, tensor: torch.Tensor) -> str:
        """Returns the parameter's name if Horovod's sparse_as_dense made a new tensor: it belongs to the parameter whose hook runs now, or
        to the only one left with a sparse gradient of this shape."""
        left = [
            name for name, p in self._parameters.items()
            if name not in self._put and p.grad is not None and p.grad.is_sparse and p.shape == tensor.shape
        ]  # fmt: skip
        if self._last_hooked is not None and self._last_hooked in left:
            return self._last_hooked
        if len(left) == 1:
            return left[0]
        raise NamesError(
            f"a gradient of shape {list(tensor.shape)} belongs to none of the {len(self._parameters)} bound parameters: bind all of the "
            "model's named_parameters(), and use one bound object for one optimizer only"
        )


def _exchange_alone(bound: BoundCompression) -> Any:
    """Registers a hook that, at world size 1, exchanges the gradients just before an optimizer of the bound parameters makes its step.
    Returns the hook's handle."""
    mine = {id(p) for p in bound._parameters.values()}
    left: dict[str, tuple[torch.Tensor, int]] = {}  # by name: the gradients that the last exchange has left, and their versions

    def is_left(name: str, gradient: torch.Tensor) -> bool:
        return name in left and left[name][0] is gradient and left[name][1] == gradient._version

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if bound._process_set.size() != 1 or not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            return
        gradients = {name: p.grad for name, p in bound._parameters.items() if p.grad is not None}
        if gradients and all(is_left(name, gradient) for name, gradient in gradients.items()):
            return  # torch calls this for Horovod's `step`, and again for the `step` of the class that it has wrapped
        session = bound._get_session()
        for name, gradient in gradients.items():
            session.put(name, gradient)
        for name, result in session.finish(bound._parameters).items():
            bound._parameters[name].grad = result
            left[name] = result, result._version

    return register_optimizer_step_pre_hook(before_step)
