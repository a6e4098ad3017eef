"""`DistributedOptimizer`: any torch optimizer, with gradients exchanged through a Grace before each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...checkpoints.elastic import STALE
from ...checkpoints.saveable import Saveable, nothing_saveable
from ...composition.grace import Grace
from ...driver.agreement import agree
from ...driver.driver import Driver
from ...errors import GraceError, NamesError, TensorChangedError, UnsupportedError
from ...exchange.perform import perform
from ...metrics.metrics import Measured
from ..horovod import chosen_compression
from ..optimizers import rate_of
from . import engine
from .ops import ops_for
from .session import Session, check_none_new, check_torch_optimizer, named, require_sum_or_mean

api = engine.api
_hooks: Any = WeakTensorKeyDictionary()  # the hook that this module has on each parameter


UNSCALED = (
    "with scaler= the gradients must be exchanged before they are unscaled: call optimizer.synchronize(), "
    "scaler.unscale_(optimizer), and scaler.step(optimizer) inside `with optimizer.skip_synchronize():`"
)


def DistributedOptimizer(  # noqa: N802 (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Any = None,
    compression: Any = None,
    backward_passes_per_step: int = 1,
    op: Any = api.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = api.global_process_set,
    *,
    simulate: bool = False,
    scaler: Any = None,
) -> CompressedOptimizer:
    """Wraps an optimizer so that `step()` applies the gradients of all ranks, as `horovod.torch.DistributedOptimizer` does.

    optimizer: any torch optimizer. The result shares its parameter groups and state, and is of its class, so schedulers work.
    named_parameters: model.named_parameters(); it must name every parameter of the optimizer. None numbers the parameters.
    compression: a Grace, a spec string ('topk(ratio=0.01) + residual'), or what Horovod takes (None, hvd.Compression.none or .fp16). For
      the latter the result is Horovod's own optimizer, without what is listed at the end; over torch.distributed it is the equivalent
      'none' or 'fp16'.
    backward_passes_per_step: the gradients of that many backward passes are summed, compressed once, and exchanged.
    op: hvd.Average or hvd.Sum. Any other op raises UnsupportedError.
    gradient_predivide_factor: accepted, without effect: sums are formed in float32 (16-bit ones too), so splitting the division changes
      nothing.
    num_groups, groups: checked as Horovod does, without effect: compressed gradients travel in buckets of about 25 MB, not in groups.
    sparse_as_dense: True compresses sparse gradients as dense ones; False exchanges them exactly, uncompressed, as Horovod does.
    process_set: the ranks that take part.
    simulate: True compresses at world size 1 too, to see the effect of compression without a cluster.
    scaler: the torch.amp.GradScaler that scales the loss. Gradients are divided by the scale before they are compressed, and multiplied
      by it afterwards, so that what the memory holds does not depend on the scale. `step()` by itself then raises UnsupportedError; use
      Horovod's recipe:
        optimizer.synchronize(); scaler.unscale_(optimizer)
        with optimizer.skip_synchronize(): scaler.step(optimizer)
        scaler.update()
      An Inf on one rank becomes an Inf on all: all skip the step, lower the scale, and keep their memory as it was.

    Beyond Horovod's optimizer the result has `wire_bytes`, the bytes that this rank handed to collectives in the last step; `measure(...)`
    and `metrics()`, as in grace_ext.metrics; and this rank's memory in `state_dict()['grace_ext']`.
    """
    if gradient_predivide_factor != 1.0 and op != api.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if num_groups != 0:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    chosen = _compression(compression)
    if chosen is None:
        compression = api.Compression.none if compression is None else compression
        horovods = api.DistributedOptimizer(
            optimizer, named_parameters, compression, backward_passes_per_step, op, gradient_predivide_factor,
            0, groups, sparse_as_dense, process_set,
        )  # fmt: skip
        return _checked_at_first(horovods, compression, process_set)
    check_torch_optimizer(chosen, optimizer)
    _check_groups(groups)
    # The wrapped optimizer's class stays a base class, so that schedulers and isinstance() see what they expect.
    cls: Any = type(type(optimizer).__name__, (CompressedOptimizer, type(optimizer)), {"__module__": __name__})
    wrapped: CompressedOptimizer = cls.__new__(cls)
    wrapped.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key not in ("step", "zero_grad")})
    average = require_sum_or_mean(op, api)
    wrapped._begin(chosen, named_parameters, average, sparse_as_dense, simulate, scaler)
    wrapped.backward_passes_per_step, wrapped.op, wrapped.process_set = backward_passes_per_step, op, process_set
    wrapped.gradient_predivide_factor, wrapped.sparse_as_dense = gradient_predivide_factor, sparse_as_dense
    wrapped._connect()
    return wrapped


def _checked_at_first(optimizer: Any, compression: Any, process_set: Any) -> Any:
    """Makes Horovod's own optimizer take part in the agreement of the first step; without it, a peer that compresses would wait for ever.
    Returns the optimizer."""
    synchronize = optimizer.synchronize

    def agree_then_synchronize() -> None:
        if process_set.included() and process_set.size() > 1:
            ops = ops_for(optimizer.param_groups[0]["params"][0].device)
            mine = {"spec": f"Horovod's own {compression.__name__}", "seed": 0, "parameters": [], "number": 0}
            transport = engine.transport(ops, process_set)
            perform(agree(ops, transport, mine), transport, {})
        optimizer.synchronize = synchronize
        synchronize()

    optimizer.synchronize = agree_then_synchronize
    return optimizer


def _compression(compression: Any) -> Grace | None:
    """Returns the Grace to use; None if Horovod's own optimizer is to be used."""
    chosen = chosen_compression(compression, api.Compression)
    return None if engine.ENGINE == "horovod" and not isinstance(compression, (Grace, str)) else chosen


def _check_groups(groups: Any) -> None:
    if groups is None or (isinstance(groups, int) and not isinstance(groups, bool) and groups >= 0):
        return
    if not isinstance(groups, list):
        raise ValueError("groups should be a non-negative integer or a list of list of torch.Tensor.")
    flat = [p for group in groups for p in group]
    if any(not isinstance(p, torch.Tensor) for p in flat):
        raise ValueError("groups must consist of torch.Tensor.")
    if len({id(p) for p in flat}) < len(flat):
        raise ValueError("A parameter can only appear once in groups.")


class CompressedOptimizer(Measured, torch.optim.Optimizer):
    """The optimizer that `DistributedOptimizer` returns. Its class derives from this one and, after it, from the wrapped optimizer's class;
    it shares the wrapped optimizer's parameter groups and state."""

    backward_passes_per_step: int
    op: Any
    process_set: Any
    gradient_predivide_factor: float
    sparse_as_dense: bool

    def _begin(self, chosen: Grace, named_parameters: Any, average: bool, sparse_as_dense: bool, simulate: bool, scaler: Any) -> None:
        self._grace, self._average, self._simulate, self._scaler = chosen, average, simulate, scaler
        self._parameters = self._named(named_parameters)
        self._session: Session | None = None
        self._delay: dict[str, int] = {}
        self._sparse: set[str] = set()
        self._synchronized, self._should_synchronize = False, True
        self._pending = False
        self._wire_bytes_sparse = 0

    def _named(self, named_parameters: Any) -> dict[str, torch.nn.Parameter]:
        """Returns the optimizer's parameters that train, by name. Raises NamesError if one of the optimizer's parameters has no name."""
        own = [p for group in self.param_groups for p in group["params"]]
        if named_parameters is None:
            named_parameters = [
                (f"allreduce.noname.{i}.{j}", p) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])
            ]
        by_name = named(named_parameters)
        known, mine = {id(p) for p in by_name.values()}, {id(p) for p in own}
        unnamed = [i for i, p in enumerate(own) if id(p) not in known]
        if unnamed:
            raise NamesError(f"named_parameters lacks {len(unnamed)} of the optimizer's {len(own)} parameters (positions {unnamed[:5]}...)")
        return {name: p for name, p in by_name.items() if id(p) in mine and p.requires_grad}

    def _connect(self) -> None:
        """Makes the session and hooks the parameters, if this rank takes part in an exchange."""
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        if not self._parameters or not self.process_set.included() or (self.process_set.size() == 1 and not self._simulate):
            return
        self._session = Session(
            self._grace,
            self._parameters,
            lambda ops: engine.transport(ops, self.process_set),
            average=self._average,
            read_lr=lambda: rate_of(self.param_groups),
            scaler=self._scaler,
        )
        for name, parameter in self._parameters.items():
            if parameter in _hooks:
                _hooks[parameter].remove()  # the hook of an optimizer that this one replaces
            _hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._make_hook(name))

    def _make_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self._delay[name] <= 0:
                raise AssertionError(
                    "Gradients were computed more than backward_passes_per_step times before call to step(). "
                    "Increase backward_passes_per_step to accumulate gradients locally."
                )
            self._pending = True
            self._delay[name] -= 1
            if self._delay[name] == 0:
                assert parameter.grad is not None  # this hook runs after torch has accumulated it
                self._put(name, parameter.grad)

        return hook

    def _put(self, name: str, gradient: torch.Tensor) -> None:
        assert self._session is not None
        if gradient.is_sparse:
            if not self.sparse_as_dense:
                if name in self._session.driver.specs:
                    raise TensorChangedError(f"the gradient of {name!r} was dense at first and is sparse now; pass sparse_as_dense=True")
                self._sparse.add(name)
                return
            gradient = gradient.to_dense()
        self._session.put(name, gradient)

    # --- Horovod's methods ------------------------------------------------------------------------------------------
    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sets the number of backward passes whose gradients are summed before an exchange."""
        self.backward_passes_per_step = passes
        self._delay = dict.fromkeys(self._parameters, passes)

    def synchronize(self) -> None:
        """Waits for the exchange to end: every gradient becomes the aggregate of all ranks."""
        if self._session is not None:
            self._check_world()
            for name, parameter in self._parameters.items():
                if self._delay[name] > 0 and parameter.grad is not None:
                    self._put(name, parameter.grad)
            self._wire_bytes_sparse = 0
            dense = [name for name in self._parameters if name not in self._sparse]
            first, handles = not self._session.driver.agreed, []
            try:
                if not first:  # at the first step the ranks may not yet agree on which gradients are sparse
                    handles = self._start_all_sparse()
                results = self._session.finish(dense) if dense else {}
                if first:
                    handles = self._start_all_sparse()
            finally:
                self._delay = dict.fromkeys(self._parameters, self.backward_passes_per_step)
                self._pending = False
            for name, result in results.items():
                self._set_gradient(self._parameters[name], result)
            for name, handle in handles:
                gradient = self._parameters[name].grad
                assert gradient is not None
                gradient.zero_().add_(handle())
        self._synchronized = True

    def _check_world(self) -> None:
        assert self._session is not None
        size = self._session.driver.transport.size
        if size != self.process_set.size():
            raise GraceError(STALE.format(size, self.process_set.size()))
        check_none_new(self, self._parameters.values())

    @staticmethod
    def _set_gradient(parameter: torch.nn.Parameter, result: torch.Tensor) -> None:
        if parameter.grad is None or parameter.grad is result:
            parameter.grad = result
        elif parameter.grad.is_sparse:
            parameter.grad.zero_().add_(result.to_sparse(parameter.grad.sparse_dim()))
        else:
            cast(Any, parameter.grad).set_(result)  # torch's stub lacks set_(Tensor)

    def _start_all_sparse(self) -> list[tuple[str, Any]]:
        return [(name, self._start_sparse(name)) for name in self._parameters if name in self._sparse]

    def _start_sparse(self, name: str) -> Any:
        """Starts the engine's own sparse all-reduce of a gradient, uncompressed; returns its handle."""
        parameter = self._parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter).to_sparse(1)
        elif not parameter.grad.is_sparse:
            raise UnsupportedError(f"the gradient of {name!r} was sparse at first and is dense now; pass sparse_as_dense=True")
        sent = parameter.grad.coalesce()
        self._wire_bytes_sparse += sent.indices().nbytes + sent.values().nbytes
        return api.sparse_allreduce_async(parameter.grad, name=f"grace/sparse/{name}", op=self.op, process_set=self.process_set)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Keeps `step()` from synchronizing inside the with block, for scripts that called `synchronize()` themselves (clipping, loss
        scaling)."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Any = None) -> Any:
        """Synchronizes, unless inside `skip_synchronize`, and makes the wrapped optimizer's step."""
        if self._should_synchronize:
            if self._scaler is not None and self._scaler.is_enabled() and self._session is not None:
                raise UnsupportedError(UNSCALED)
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() called after optimizer.synchronize() without optimizer.skip_synchronize(): gradients are "
                    "exchanged twice",
                    stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        return super().step(closure)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clears the gradients as the wrapped optimizer does. Raises AssertionError between backward() and step(), while an exchange is
        under way."""
        if self._pending:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
                "This is prohibited as it can cause a race condition."
            )
        super().zero_grad(*args, **kwargs)

    def move(self, carried_over: Callable[[Any], Any]) -> None:
        """Exchanges among the present ranks from now on, after the ranks of the job have changed. `carried_over` maps this rank's old
        state to its state among the present ranks; it is a collective."""
        if self.process_set is not api.global_process_set:
            raise UnsupportedError("process sets do not survive a change of ranks; leave process_set out in an elastic job")
        if self._session is None:
            self._connect()
        if self._session is not None:
            self._session.move(carried_over, lambda ops: engine.transport(ops, self.process_set), self._average)
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized, self._pending = False, False

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank handed to collectives in the last step: payloads, headers, all rounds, sparse gradients."""
        return (self._session.wire_bytes if self._session else 0) + self._wire_bytes_sparse

    def _drivers(self) -> list[Driver]:
        return [self._session.driver] if self._session else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state_dict and, under 'grace_ext', this rank's memory and compressor state. The latter differs by
        rank: save every rank's."""
        saved = super().state_dict()
        return {**saved, "grace_ext": self._session.state_dict()} if self._session else saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the wrapped optimizer's state, and this rank's memory from 'grace_ext'. Without that entry the memory stays as it is."""
        own = state_dict.get("grace_ext")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grace_ext"})
        if own is not None and self._session is not None:
            self._session.load_state_dict(own)
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized, self._should_synchronize, self._pending = False, True, False

    def _saveable(self) -> Saveable:
        return self._session.saveable() if self._session else nothing_saveable(self.process_set.included())


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: Any = None, *, memory: bool = True) -> None:
    """Gives every rank the optimizer state of root_rank, as `horovod.torch.broadcast_optimizer_state` does.

    The memory of compression belongs to each rank and stays. But if the root is at another step (it alone has loaded a checkpoint), a rank
    takes from the root the state that all ranks share, and its own memory starts at zero, with a warning.
    model: passed on to Horovod. memory: False leaves the memory alone even then."""
    args = (optimizer, root_rank) + (() if model is None else (model,))
    if not isinstance(optimizer, CompressedOptimizer):
        api.broadcast_optimizer_state(*args)
        return
    # Horovod fills an empty state by a step with zero gradients, which must not start an exchange.
    with optimizer.skip_synchronize():
        api.broadcast_optimizer_state(*args)
    session = optimizer._session
    steps = api.allgather_object(session and session.driver.step, name="grace.step") if memory else []
    if len({step for step in steps if step is not None}) > 1:
        saved = api.broadcast_object(session and session.state_dict(), root_rank, name="grace.state")
        if session is not None and session.driver.step != saved["step"]:
            session.load_state_dict(saved)
