"""`DistributedOptimizer`: any torch optimizer, with gradients exchanged through a Grace before each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
_hooks: Any = WeakTensorKeyDictionary()  # the hook that this module has on a parameter


UNSCALED = (
    "with scaler= the gradients of all ranks must be there before they are unscaled: call optimizer.synchronize(), "
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
) -> torch.optim.Optimizer:
    """Wraps an optimizer so that `step()` applies the gradients of all ranks, as `horovod.torch.DistributedOptimizer` does.

    compression: a Grace, a spec string ('topk(ratio=0.01) + residual'), or what Horovod takes (None, hvd.Compression.none or .fp16):
      then it is Horovod's own optimizer, or its equal over torch.distributed.
    backward_passes_per_step: gradients of that many backward passes are added up, compressed once, and exchanged.
    op: Average or Sum; anything else is refused with a reason.
    gradient_predivide_factor: accepted; sums are formed in float32 (16-bit ones too), so splitting the division changes nothing.
    num_groups, groups: checked as Horovod does; gradients always travel in buckets of about 25 MB, which takes the place of groups.
    sparse_as_dense: sparse gradients are compressed as dense ones; otherwise they are exchanged exactly, uncompressed, as in Horovod.
    process_set: only these ranks take part.
    simulate: compress at world size 1 too, to see the effect of compression without a cluster.
    scaler: the torch.amp.GradScaler that scales the loss. Gradients are compressed as if it were not there, so that a change of scale does
      not change what the memory means. The step is then Horovod's recipe, and `step()` by itself is refused:
        optimizer.synchronize(); scaler.unscale_(optimizer)
        with optimizer.skip_synchronize(): scaler.step(optimizer)
        scaler.update()
      An Inf on one rank is one on all: all skip the step, lower the scale, and keep their memory as it was.
    Attributes beyond Horovod's: `wire_bytes`, the bytes this rank handed to collectives in the last step; `state_dict()` holds the
    memory of this rank under 'grace_ext'.
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
    # The class of the wrapped optimizer is kept as a base, so that schedulers and isinstance() see what they expect.
    cls = type(type(optimizer).__name__, (_Distributed, type(optimizer)), {"__module__": __name__})
    wrapped = cls.__new__(cls)
    wrapped.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key not in ("step", "zero_grad")})
    average = require_sum_or_mean(op, api)
    wrapped._begin(chosen, named_parameters, average, sparse_as_dense, simulate, scaler)
    wrapped.backward_passes_per_step, wrapped.op, wrapped.process_set = backward_passes_per_step, op, process_set
    wrapped.gradient_predivide_factor, wrapped.sparse_as_dense = gradient_predivide_factor, sparse_as_dense
    wrapped._connect()
    return wrapped


def _checked_at_first(optimizer: Any, compression: Any, process_set: Any) -> Any:
    """Horovod's own optimizer, which takes part in the agreement of the first step: a peer that compresses would wait for ever."""
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
    """Returns the Grace to use; None if Horovod's own optimizer serves."""
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


class _Distributed(Measured, torch.optim.Optimizer):
    """What is put in front of the wrapped optimizer's class. Its instances share the wrapped one's groups and state."""

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
        """The optimizer's parameters that train, by name; all of them must be named."""
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
        """Hooks up the parameters, where this rank takes part in an exchange."""
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
                _hooks[parameter].remove()  # of an optimizer that this one takes the place of
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
        """How many backward passes are added up before an exchange."""
        self.backward_passes_per_step = passes
        self._delay = dict.fromkeys(self._parameters, passes)

    def synchronize(self) -> None:
        """Ends the exchange: every gradient becomes the aggregate of all ranks. Waits."""
        if self._session is not None:
            self._check_world()
            for name, parameter in self._parameters.items():
                if self._delay[name] > 0 and parameter.grad is not None:
                    self._put(name, parameter.grad)
            self._wire_bytes_sparse = 0
            dense = [name for name in self._parameters if name not in self._sparse]
            first, handles = not self._session.driver.agreed, []
            try:
                if not first:  # before that, ranks may not know alike which gradients are sparse
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
        size = self._session.driver.transport.size  # type: ignore[union-attr]
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
            parameter.grad.set_(result)

    def _start_all_sparse(self) -> list[tuple[str, Any]]:
        return [(name, self._start_sparse(name)) for name in self._parameters if name in self._sparse]

    def _start_sparse(self, name: str) -> Any:
        """A sparse gradient goes uncompressed through the engine's own sparse all-reduce."""
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
        """Within it `step()` does not synchronize, for scripts that called `synchronize()` themselves (clipping, loss scaling)."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Any = None) -> Any:
        """Synchronizes, unless inside `skip_synchronize`, and lets the wrapped optimizer step."""
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
        """As the wrapped optimizer's; refused between backward() and step(), where an exchange is under way."""
        if self._pending:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
                "This is prohibited as it can cause a race condition."
            )
        super().zero_grad(*args, **kwargs)

    def move(self, carried_over: Callable[[Any], Any]) -> None:
        """After the ranks have changed: exchanges among those that there are now. `carried_over` gives this rank's state for them, from
        that of before; collective."""
        if self.process_set is not api.global_process_set:
            raise UnsupportedError("process sets do not survive a change of ranks: in an elastic job leave process_set out")
        if self._session is None:
            self._connect()
        if self._session is not None:
            self._session.move(carried_over, lambda ops: engine.transport(ops, self.process_set), self._average)
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized, self._pending = False, False

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def wire_bytes(self) -> int:
        """Bytes this rank handed to collectives in the last step: payloads, headers, all rounds, sparse gradients."""
        return (self._session.wire_bytes if self._session else 0) + self._wire_bytes_sparse

    def _drivers(self) -> list[Driver]:
        return [self._session.driver] if self._session else []

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, and under 'grace_ext' this rank's memory and compressor state. It differs by rank: save every rank's."""
        saved = super().state_dict()
        return {**saved, "grace_ext": self._session.state_dict()} if self._session else saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes both. Without a 'grace_ext' entry the memory stays as it is."""
        own = state_dict.get("grace_ext")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grace_ext"})
        if own is not None and self._session is not None:
            self._session.load_state_dict(own)
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized, self._should_synchronize, self._pending = False, True, False

    def _saveable(self) -> Saveable:
        return self._session.saveable() if self._session else nothing_saveable(self.process_set.included())


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: Any = None, *, memory: bool = True) -> None:
    """As Horovod's: every rank gets the root's optimizer state. The memory of compression is each rank's own and stays; but where the
    root is at another step (it alone has loaded a checkpoint), a rank takes from it what all ranks share, and its own memory starts at
    zero, with a warning. memory=False leaves it alone."""
    args = (optimizer, root_rank) + (() if model is None else (model,))
    if not isinstance(optimizer, _Distributed):
        api.broadcast_optimizer_state(*args)
        return
    # Horovod fills an empty state by a step on zero gradients, which must not start an exchange.
    with optimizer.skip_synchronize():
        api.broadcast_optimizer_state(*args)
    session = optimizer._session
    steps = api.allgather_object(session and session.driver.step, name="grace.step") if memory else []
    if len({step for step in steps if step is not None}) > 1:
        saved = api.broadcast_object(session and session.state_dict(), root_rank, name="grace.state")
        if session is not None and session.driver.step != saved["step"]:
            session.load_state_dict(saved)
