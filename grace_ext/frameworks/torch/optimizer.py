"""`DistributedOptimizer`: any torch optimizer, with gradients exchanged through a Grace before each step."""

from __future__ import annotations

import functools
import numbers
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from ...checkpoints.saveable import Saveable, nothing_saveable
from ...composition.grace import Grace
from ...driver.agreement import agree
from ...driver.driver import Driver
from ...errors import GraceError, ParameterError, UnsupportedError, shown
from ...exchange.perform import perform
from ...metrics.metrics import Measured
from ...privacy.settings import Privacy
from ..horovod import chosen_compression
from ..optimizers import rate_of
from . import engine
from .arguments import check_groups, named
from .dcp import called_by_dcp, leaves_out
from .devices import ops_for
from .gradients import GradientExchange
from .guards import check_optimizer_kind
from .in_front import InFront, in_front_of
from .private import check_private_training, forget_examples
from .session import check_none_new, check_torch_optimizer, require_sum_or_mean

api = engine.api
P = ParamSpec("P")
R = TypeVar("R")

UNSCALED = (
    "with scaler= the gradients must be exchanged before they are unscaled: call optimizer.synchronize(), "
    "scaler.unscale_(optimizer), and scaler.step(optimizer) inside `with optimizer.skip_synchronize():`"
)
GRACE_FORMS = (
    "GRACE's form hvd.DistributedOptimizer(optimizer, grc, named_parameters=...) is written hvd.DistributedOptimizer(optimizer, "
    "named_parameters=model.named_parameters(), compression=g) here"
)


def _recognizing_grace(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps DistributedOptimizer so that a call in GRACE's form is told the new form, and not Python's words for it."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if "grace" in kwargs or (len(args) > 1 and isinstance(args[1], (Grace, str))):
            raise ParameterError(GRACE_FORMS)
        return function(*args, **kwargs)

    return checked


@_recognizing_grace
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
    overlap: bool = True,
    clip_before: float | None = None,
    clip_after: float | None = None,
    check_start: bool = True,
    privacy: Privacy | None = None,
) -> CompressedOptimizer:
    """Wraps an optimizer so that `step()` applies the gradients of all ranks, as `horovod.torch.DistributedOptimizer` does.

    optimizer: any torch optimizer. The result shares its parameter groups and state, and is of its class, so schedulers work.
    named_parameters: model.named_parameters(); it must name every parameter of the optimizer. None numbers the parameters.
    compression: what grace_ext.grace takes ('topk(ratio=0.01) + residual'), or what Horovod takes (None, hvd.Compression.none or .fp16).
      For the latter the result is Horovod's own optimizer, without what is listed at the end; over torch.distributed it is the equivalent
      'none' or 'fp16'.
    backward_passes_per_step: the gradients of that many backward passes are summed, compressed once, and exchanged.
    op: hvd.Average or hvd.Sum. Any other op raises UnsupportedError.
    gradient_predivide_factor: accepted, without effect: sums are formed in float32 (16-bit ones too), so splitting the division changes
      nothing.
    num_groups, groups: checked as Horovod does, without effect: compressed gradients travel in buckets of about 25 MB, not in groups.
    sparse_as_dense: True compresses sparse gradients as dense ones; False exchanges them exactly, uncompressed, as Horovod does.
    process_set: the ranks that take part.
    simulate: True compresses at world size 1 too, to see the effect of compression without a cluster. Without it a single rank sends
      nothing, but a memory that is the training's momentum keeps it, and votes stay votes.
    scaler: the torch.amp.GradScaler that scales the loss. Gradients are divided by the scale before they are compressed, and multiplied
      by it afterwards, so that what the memory holds does not depend on the scale. `step()` by itself then raises UnsupportedError; use
      Horovod's recipe:
        optimizer.synchronize(); scaler.unscale_(optimizer)
        with optimizer.skip_synchronize(): scaler.step(optimizer)
        scaler.update()
      An Inf on one rank becomes an Inf on all: all skip the step, lower the scale, and keep their memory as it was.
    overlap: True starts the exchange during backward(); what is done to .grad afterwards is an error, unless synchronize() was called
      first. False starts it in step(): gradients may be clipped, masked or cleared before, at the price of the overlap.
    clip_before: clips each rank's own gradients to this global norm before they are exchanged (which turns overlap off).
    clip_after: clips the aggregates to this global norm, the same on all ranks.
    check_start: compares the bits of all ranks' parameters at the first step, and raises DisagreementError if they differ (usually because
      hvd.broadcast_parameters is missing); it costs one pass over the parameters and about 30 bytes per parameter.
    privacy: hvd.Privacy(...), which makes each rank's gradient private before it is compressed, in step() (there is no overlap); or the
      spec has it in front: 'gaussian(clip=1) | topk + residual'. With unit='example' call hvd.per_example_backward(...) in place of
      loss.backward(), or wrap the model in opacus.GradSampleModule. `epsilon(delta)` says what was spent.

    `step(closure)` runs the closure and exchanges the gradients that it computes; with LBFGS at every evaluation, whose loss is then the
    mean of the ranks' losses.

    Beyond Horovod's optimizer the result has `discard()` and `undo()`, for gradients that shall not count; `wire_bytes`, the bytes that
    this rank handed to collectives in the last step; `measure(...)` and `metrics()`, as in grace_ext.metrics; and this rank's memory in
    `state_dict()['grace_ext']`."""
    if gradient_predivide_factor != 1.0 and op != api.Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if backward_passes_per_step <= 0:
        raise ValueError("backward_passes_per_step must be > 0")
    if num_groups != 0:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    chosen = _compression(compression, privacy)
    if chosen is None:
        compression = api.Compression.none if compression is None else compression
        horovods = api.DistributedOptimizer(
            optimizer, named_parameters, compression, backward_passes_per_step, op, gradient_predivide_factor,
            0, groups, sparse_as_dense, process_set,
        )  # fmt: skip
        return _checked_at_first(horovods, compression, process_set)
    check_optimizer_kind(optimizer, "DistributedOptimizer")
    check_torch_optimizer(chosen, optimizer)
    if chosen.privacy is not None:
        check_private_training(chosen.privacy, optimizer, scaler, clip_before)
    check_groups(groups)
    for name, norm in (("clip_before", clip_before), ("clip_after", clip_after)):
        if norm is not None and not (isinstance(norm, (numbers.Real, torch.Tensor)) and norm > 0):
            raise ParameterError(f"{name} is the largest norm of the gradients, a number above 0, or None; got {shown(norm)}")
    parameters = named(optimizer, named_parameters)
    average = require_sum_or_mean(op, api)
    wrapped = in_front_of(optimizer, CompressedOptimizer)
    wrapped.op, wrapped.process_set = op, process_set
    wrapped.gradient_predivide_factor, wrapped.sparse_as_dense = gradient_predivide_factor, sparse_as_dense
    wrapped._clip_before, wrapped._clip_after = clip_before, clip_after
    wrapped._exchange = GradientExchange(
        chosen, parameters, average=average, op=op, process_set=process_set, passes=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense, simulate=simulate, scaler=scaler, read_lr=lambda: rate_of(optimizer.param_groups),
        check_start=check_start, overlap=overlap and clip_before is None and chosen.privacy is None,
    )  # fmt: skip
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


def _compression(compression: Any, privacy: Privacy | None) -> Grace | None:
    """Returns the Grace to use; None if Horovod's own optimizer is to be used."""
    chosen = chosen_compression(compression, api.Compression).with_privacy(privacy)
    if chosen.privacy is not None:
        return chosen
    horovods = any(compression is one for one in (None, api.Compression.none, api.Compression.fp16))
    return None if engine.ENGINE == "horovod" and horovods else chosen


class CompressedOptimizer(Measured, InFront):
    """The optimizer that `DistributedOptimizer` returns. Its class derives from this one and, after it, from the wrapped optimizer's class;
    it shares the wrapped optimizer's parameter groups and state."""

    op: Any
    process_set: Any
    gradient_predivide_factor: float
    sparse_as_dense: bool
    _exchange: GradientExchange
    _clip_before: float | None
    _clip_after: float | None

    # --- Horovod's methods ------------------------------------------------------------------------------------------
    @property
    def backward_passes_per_step(self) -> int:
        """The number of backward passes whose gradients are summed before an exchange."""
        return self._exchange.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sets the number of backward passes whose gradients are summed before an exchange."""
        self._exchange.set_passes(passes)

    def synchronize(self) -> None:
        """Waits for the exchange to end: every gradient becomes the aggregate of all ranks. Until the next step begins, `undo()` takes it
        back."""
        self._synchronize(revocable=True)

    def _synchronize(self, revocable: bool = False) -> None:
        if self._exchange.session is not None:
            check_none_new(self, self._exchange.parameters.values())
        self._exchange.finish(revocable=revocable, change=lambda: self._clip(self._clip_before))
        self._clip(self._clip_after)

    def _clip(self, norm: float | None) -> None:
        if norm is None:
            return
        gradients = [p for p in self._exchange.parameters.values() if p.grad is not None]
        if any(p.grad is not None and p.grad.is_sparse for p in gradients):
            raise UnsupportedError("clip_before and clip_after need dense gradients; pass sparse_as_dense=True")
        session = self._exchange.session
        torch.nn.utils.clip_grad_norm_(gradients, norm * (session.scale if session else 1.0))

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Keeps `step()` from synchronizing inside the with block, for scripts that called `synchronize()` themselves (clipping, loss
        scaling)."""
        self._exchange.should_synchronize = False
        try:
            yield
        finally:
            self._exchange.should_synchronize = True

    def step(self, closure: Any = None, **options: Any) -> Any:
        """Synchronizes, unless inside `skip_synchronize`, and makes the wrapped optimizer's step.

        closure: computes the loss and its gradients, which are exchanged each time the wrapped optimizer calls it. options: passed on."""
        exchange = self._exchange
        if not exchange.pending and called_by_dcp():  # its step of zeros only makes the wrapped optimizer's state
            return super().step(**options)
        self._mark_step()
        if exchange.should_synchronize:
            if exchange.scaler is not None and exchange.scaler.is_enabled() and exchange.session is not None:
                raise UnsupportedError(UNSCALED)
            if exchange.synchronized:
                warnings.warn(SYNCHRONIZED_TWICE, stacklevel=2)
            if closure is None:
                self._synchronize()
        if closure is None:
            result = super().step(**options)
        else:
            evaluate = _Closure(closure, self)
            result = super().step(evaluate, **options)
            evaluate.check()
        exchange.stepped()
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clears the gradients as the wrapped optimizer does. With overlap, raises AssertionError between backward() and step(), while an
        exchange is under way."""
        if self._exchange.pending and self._exchange.overlap and self._exchange.session is not None:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
                "This is prohibited as it can cause a race condition. To drop these gradients, call optimizer.discard() on every rank; or "
                "wrap with overlap=False, where nothing is exchanged before step()."
            )
        super().zero_grad(*args, **kwargs)
        if self._exchange.grace.privacy:
            forget_examples(self._exchange.parameters.values())

    # --- gradients that shall not count -------------------------------------------------------------------------------
    def discard(self) -> None:
        """Drops the gradients computed since the last step, on every rank: nothing is applied, the memory stays as it was, and every .grad
        becomes None. Every rank must call it (it ends the exchange under way); if only some do, all raise an error at the next step."""
        self._exchange.discard()

    def undo(self) -> None:
        """Takes back the exchange of the last `synchronize()`, for a step that shall be skipped: the memory becomes what it was, and every
        .grad becomes None. Every rank must call it; if only some do, all raise an error at the next step."""
        self._exchange.undo()

    def move(self, carried_over: Callable[[Any], Any]) -> None:
        """Exchanges among the present ranks from now on, after the ranks of the job have changed. `carried_over` maps this rank's old
        state to its state among the present ranks; it is a collective."""
        self._exchange.move(carried_over)

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank handed to collectives in the last step: payloads, headers, all rounds, sparse gradients."""
        return self._exchange.wire_bytes

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, those before a checkpoint included: what an observer of all messages and
        of the model learns about one unit (docs/privacy.md). Raises UnsupportedError without privacy."""
        if self._exchange.session is None:
            raise UnsupportedError("this rank exchanges nothing, so it has no epsilon: ask a rank of the process set, with privacy=")
        return self._exchange.session.driver.epsilon(delta)

    def _drivers(self) -> list[Driver]:
        return [self._exchange.session.driver] if self._exchange.session else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state_dict and, under 'grace_ext', this rank's memory and compressor state. The latter differs by
        rank: save every rank's. torch.distributed.checkpoint gets it from a DistributedState, and not from here."""
        saved, own = super().state_dict(), None if leaves_out(self) else self._exchange.state_dict()
        return saved if own is None else {**saved, "grace_ext": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the wrapped optimizer's state, and this rank's memory from 'grace_ext'. Without that entry the memory stays as it is.
        Raises GraceError, and changes nothing, if the memory does not fit."""
        self._exchange.check_state(state_dict.get("grace_ext"))
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grace_ext"})
        self._exchange.load_state_dict(state_dict.get("grace_ext"))

    def _saveable(self) -> Saveable:
        session = self._exchange.session
        return session.saveable() if session else nothing_saveable(self.process_set.included())


class _Closure:
    """A user's closure, whose gradients are exchanged each time the wrapped optimizer calls it."""

    def __init__(self, closure: Callable[[], Any], optimizer: CompressedOptimizer):
        self._closure, self._optimizer, self._calls = closure, optimizer, 0

    def __call__(self) -> Any:
        self._calls += 1
        with torch.enable_grad():
            loss = self._closure()
        exchange = self._optimizer._exchange
        if not exchange.should_synchronize:
            if exchange.pending and exchange.session is not None:
                raise AssertionError(
                    "the closure of optimizer.step() computed gradients inside skip_synchronize(), which would stay this rank's own: call "
                    "step(closure) outside of it"
                )
            return loss
        self._optimizer._synchronize()
        # LBFGS ends its iterations by the loss: the ranks must decide alike, or they would make different numbers of exchanges.
        if isinstance(self._optimizer, torch.optim.LBFGS) and exchange.session is not None and loss is not None:
            own = torch.as_tensor(loss).detach()
            return api.allreduce(own.double().cpu(), name="grace/loss", process_set=exchange.process_set).to(own)
        return loss

    def check(self) -> None:
        """Raises GraceError if the wrapped optimizer did not call it: then it has applied gradients that were not exchanged."""
        exchange = self._optimizer._exchange
        if not self._calls and exchange.should_synchronize and exchange.session is not None:
            raise GraceError(
                f"{type(self._optimizer).__name__}.step() ignores its closure, so this rank's own gradients were applied: call "
                "backward(), and step() without a closure. The ranks' models differ now; load a checkpoint or broadcast the parameters"
            )


SYNCHRONIZED_TWICE = (
    "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(): the gradients are exchanged twice"
)


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
    session = optimizer._exchange.session
    steps = api.allgather_object(session and session.driver.step, name="grace.step") if memory else []
    if len({step for step in steps if step is not None}) > 1:
        saved = api.broadcast_object(session and session.state_dict(), root_rank, name="grace.state")
        if session is not None and session.driver.step != saved["step"]:
            session.load_state_dict(saved)
