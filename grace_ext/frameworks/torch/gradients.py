"""Exchanges the gradients of one optimizer: hooks take them as backward() makes them, and `finish` replaces them by the aggregates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...checkpoints.elastic import STALE
from ...composition.grace import Grace
from ...errors import GraceError, TensorChangedError, UnsupportedError, few, warn_user
from . import engine
from .guards import check_alone, check_containers, check_not_private
from .private import forget_examples, privatized
from .session import Session

api = engine.api
#: By parameter: the hook of the exchange that has its gradient, and a weak reference to that exchange.
_taken: Any = WeakTensorKeyDictionary()
#: Steps without a gradient after which a parameter that had one before is mentioned.
QUIET_STEPS = 3
TOO_MANY = (
    "Gradients were computed more than backward_passes_per_step times before call to step(). "
    "Increase backward_passes_per_step to accumulate gradients locally. If the earlier gradients shall not count, call "
    "optimizer.discard() on every rank, or wrap with overlap=False and call zero_grad()."
)
CHANGED = (
    "the gradients of {} parameters ({}) were changed between backward() and step(), when their exchange had begun, so the change would "
    "not count: call optimizer.synchronize() first, change them (clip, mask, unscale), and call step() inside `with "
    "optimizer.skip_synchronize()`. To change them before they are exchanged, wrap with overlap=False, or use clip_before="
)


class GradientExchange:
    """The exchange of the gradients of these parameters on this rank. What changes from step to step is here and not in the optimizer,
    because several optimizer objects may share it (Lightning copies an optimizer's attributes).

    overlap: False starts everything in `finish`, so that gradients may be changed, or cleared, until then."""

    def __init__(
        self,
        g: Grace,
        parameters: dict[str, torch.nn.Parameter],
        *,
        average: bool,
        op: Any,
        process_set: Any,
        passes: int,
        sparse_as_dense: bool,
        simulate: bool,
        scaler: Any,
        read_lr: Callable[[], float | None],
        check_start: bool,
        overlap: bool,
    ):
        self.grace, self.parameters, self.process_set, self.op = g, parameters, process_set, op
        self.scaler, self.overlap = scaler, overlap
        self._average, self._sparse_as_dense, self._simulate = average, sparse_as_dense, simulate
        self._read_lr, self._check_start = read_lr, check_start
        self.session: Session | None = None
        self.synchronized, self.should_synchronize = False, True
        self.pending = False  # whether a gradient was computed since the last `finish`
        self._sparse: set[str] = set()
        self._sparse_bytes = 0
        self._given: dict[str, tuple[torch.Tensor, int]] = {}  # by name: the gradients of this step that were put, and their versions
        self._left: dict[str, tuple[Any, int]] = {}  # by name: weak references to what the last step left in .grad, and their versions
        self._lost: list[str] = []  # parameters that a newer exchange has taken over
        self._quiet: dict[str, int] = {}  # by name: for how many steps a parameter that had a gradient has had none
        self._told: set[str] = set()
        self.set_passes(passes)
        self.connect()

    def connect(self) -> None:
        """Makes the session and hooks the parameters, if this rank takes part in an exchange. Over torch.distributed it is a collective."""
        if not self.parameters or not self.process_set.included():
            return
        if self.process_set.size() == 1:
            if self.process_set is api.global_process_set:
                check_alone(engine.ENGINE)
            if not self._simulate and not self.grace.acts_alone:
                return
        check_containers(self.parameters, "DistributedOptimizer")
        self.session = Session(
            self.grace,
            self.parameters,
            lambda ops: engine.transport(ops, self.process_set),
            wrapper="DistributedOptimizer",
            average=self._average,
            read_lr=self._read_lr,
            scaler=self.scaler,
            check_start=self._check_start,
            compressing=self._simulate or self.process_set.size() > 1,
        )
        for name, parameter in self.parameters.items():
            take_over(parameter, self, name, parameter.register_post_accumulate_grad_hook(self._make_hook(name)))

    def lose(self, name: str) -> None:
        """Takes note that a newer exchange has this parameter."""
        self._lost.append(name)

    # --- one step -----------------------------------------------------------------------------------------------------
    def _make_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        this = weakref.ref(self)

        def hook(parameter: torch.Tensor) -> None:
            if (own := this()) is not None:
                own._computed(name, parameter)

        return hook

    @torch.compiler.disable
    def _computed(self, name: str, parameter: torch.Tensor) -> None:
        self.pending = True
        if not self.overlap:
            self._delay[name] = 0
            return
        if self._delay[name] <= 0:
            raise AssertionError(TOO_MANY)
        self._delay[name] -= 1
        if self._delay[name] == 0:
            assert parameter.grad is not None  # this hook runs after torch has accumulated it
            self._put(name, parameter.grad)

    def _put(self, name: str, gradient: torch.Tensor) -> None:
        assert self.session is not None
        check_not_private(name, self.parameters[name])
        dense = gradient
        if gradient.is_sparse:
            if not self._sparse_as_dense:
                if name in self.session.driver.specs:
                    raise TensorChangedError(f"the gradient of {name!r} was dense at first and is sparse now; pass sparse_as_dense=True")
                self._sparse.add(name)
                return
            dense = gradient.to_dense()
        self.session.put(name, dense)
        self._given[name] = gradient, gradient._version

    def set_passes(self, passes: int) -> None:
        """Sets the number of backward passes whose gradients are summed before an exchange."""
        self.passes = passes
        self._delay = dict.fromkeys(self.parameters, passes)

    @torch.compiler.disable
    @torch.no_grad()
    def finish(self, *, commit: bool = True, revocable: bool = False, change: Callable[[], None] | None = None) -> None:
        """Ends the step: every gradient becomes the aggregate of all ranks. commit, revocable: as for Driver.finish.

        change: called before gradients that no hook has put are read (without overlap, before all)."""
        if self.session is None:
            self.synchronized = True
            return
        self._check_world()
        if commit and not self.grace.privacy:  # where a batch may be empty, and noise is sent in any case
            self._mention_missing()
        if change is not None:
            change()
        if self.grace.privacy:
            computed = [name for name, delay in self._delay.items() if delay < self.passes]
            for name, made in privatized(self.session.driver, self.parameters, computed, self._sparse_as_dense).items():
                self.parameters[name].grad = made
        for name, parameter in self.parameters.items():
            if name not in self._given and name not in self._sparse and parameter.grad is not None:
                self._put(name, parameter.grad)
        changed = [n for n, (put, version) in self._given.items() if self.parameters[n].grad is not put or put._version != version]
        self._sparse_bytes = 0
        dense = [name for name in self.parameters if name not in self._sparse]
        try:
            if dense and not self.session.driver.agreed:  # among other things, on which gradients are sparse
                self.session.agree(dense)
            rows = {name: handle().coalesce() for name, handle in self._start_all_sparse()}
            # On all ranks alike: a GradScaler will skip the step if there is an Inf or NaN in any gradient.
            finite = all(bool(torch.isfinite(sum_of.values()).all()) for sum_of in rows.values())
            how = {"commit": commit and not changed, "revocable": revocable, "others_finite": finite}
            results = self.session.finish(dense, **how) if dense else {}
        finally:
            self._reset()
        if changed and commit:  # only now, so that the other ranks need not wait for this one; their next exchange tells them
            raise UnsupportedError(CHANGED.format(len(changed), few(changed)))
        for name, result in results.items():
            _set_gradient(self.parameters[name], result)
        for name, total in rows.items():
            gradient = self.parameters[name].grad
            assert gradient is not None
            gradient.zero_().add_(total)
        self._left = {name: (weakref.ref(p.grad), p.grad._version) for name, p in self.parameters.items() if p.grad is not None}
        self.synchronized = True

    def _is_new(self, name: str) -> bool:
        """Whether a parameter has a gradient that the last step has not left there."""
        gradient, (left, version) = self.parameters[name].grad, self._left.get(name, (lambda: None, 0))
        return gradient is not None and not (left() is gradient and version == gradient._version)

    def _reset(self) -> None:
        self._delay = dict.fromkeys(self.parameters, self.passes)
        self._given.clear()
        self.pending = False

    def discard(self) -> None:
        """Drops the gradients of this step, on every rank: the memory stays as it was, and gradients become None."""
        if self.session is not None:
            if self.overlap and self.session.driver.agreed:  # some rank may have started buckets, so all must end them
                self.finish(commit=False)
            else:
                self.session.forget()
        self._forget()

    def undo(self) -> None:
        """Takes back the exchange of the last `finish`, on every rank: the memory becomes what it was, and gradients become None."""
        if not self.synchronized:
            raise AssertionError(
                "optimizer.undo() takes back what optimizer.synchronize() has exchanged, and there is no synchronize() since the last "
                "step(); to drop gradients that were not synchronized, call optimizer.discard()"
            )
        if self.session is not None:
            self.session.undo()
        self._forget()

    def _forget(self) -> None:
        self._reset()
        self.synchronized = False
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.grace.privacy:
            forget_examples(self.parameters.values())

    def stepped(self) -> None:
        """Takes note that the optimizer has made its step, so that the exchange cannot be undone any more."""
        self.synchronized = False
        if self.session is not None:
            self.session.driver.forget_before()

    def _check_world(self) -> None:
        assert self.session is not None
        size = self.session.driver.transport.size
        if size != self.process_set.size():
            raise GraceError(STALE.format(size, self.process_set.size()))
        if self._lost:
            raise GraceError(
                f"{len(self._lost)} parameters ({few(self._lost)}) were taken over by an optimizer that was wrapped later, which "
                "exchanges their gradients now: step that one, or give the two optimizers different parameters"
            )

    def _mention_missing(self) -> None:
        """Warns, once each, of a step without a backward pass, and of parameters whose gradients no longer come."""
        new = {name for name, delay in self._delay.items() if delay < self.passes or self._is_new(name)}
        if not new:
            if any(parameter.grad is not None for parameter in self.parameters.values()):  # else zeros are meant: see docs/faults.md
                self._warn(
                    "no backward",
                    "optimizer.step() was called, but no gradient was computed since the last step (of this rank), so what that left in "
                    ".grad is exchanged again. A rank that has no batch calls optimizer.zero_grad() before, and takes part with zeros",
                )
            return
        for name, parameter in self.parameters.items():
            if name in new:
                self._quiet[name] = 0
            elif name in self._quiet and parameter.requires_grad:
                self._quiet[name] += 1
        quiet = [name for name, steps in self._quiet.items() if steps == QUIET_STEPS]
        if quiet:
            self._warn(
                f"quiet {quiet}",
                f"{len(quiet)} parameters ({few(quiet)}) had gradients and have none in the last {QUIET_STEPS} steps. If their layers "
                "were replaced after the optimizer was wrapped, the new ones are not exchanged: wrap a new optimizer on every rank",
            )

    def _warn(self, about: str, sentence: str) -> None:
        if about not in self._told:
            self._told.add(about)
            warn_user(sentence, every_rank=True)

    # --- sparse gradients -----------------------------------------------------------------------------------------------
    def _start_all_sparse(self) -> list[tuple[str, Any]]:
        return [(name, self._start_sparse(name)) for name in self.parameters if name in self._sparse]

    def _start_sparse(self, name: str) -> Any:
        """Starts the engine's own sparse all-reduce of a gradient, uncompressed; returns its handle."""
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter).to_sparse(1)
        elif not parameter.grad.is_sparse:
            raise UnsupportedError(f"the gradient of {name!r} was sparse at first and is dense now; pass sparse_as_dense=True")
        sent = parameter.grad.coalesce()  # rows of the same index are added up before they are sent
        self._sparse_bytes += sent.indices().nbytes + sent.values().nbytes
        return api.sparse_allreduce_async(sent, name=f"grace/sparse/{name}", op=self.op, process_set=self.process_set)

    # --- state ------------------------------------------------------------------------------------------------------
    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank handed to collectives in the last step."""
        return (self.session.wire_bytes if self.session else 0) + self._sparse_bytes

    def state_dict(self) -> dict[str, Any] | None:
        """Returns this rank's memory and compressor state; None if nothing is exchanged."""
        return self.session.state_dict() if self.session else None

    def check_state(self, saved: Mapping[str, Any] | None) -> None:
        """Raises GraceError if `load_state_dict` would; changes nothing."""
        if saved is not None and self.session is not None:
            self.session.check_state(saved)

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Loads what `state_dict` returned. With None the memory stays as it is. The step under way is forgotten."""
        if saved is not None and self.session is not None:
            self.session.load_state_dict(saved)
        self._reset()
        self.synchronized, self.should_synchronize = False, True

    def move(self, carried_over: Callable[[Any], Any]) -> None:
        """Exchanges among the present ranks from now on, as Session.move does."""
        if self.process_set is not api.global_process_set:
            raise UnsupportedError("process sets do not survive a change of ranks; leave process_set out in an elastic job")
        if self.session is None:
            self.connect()
        if self.session is not None:
            self.session.move(carried_over, lambda ops: engine.transport(ops, self.process_set), self._average)
        self._reset()
        self.synchronized = False


def take_over(parameter: torch.Tensor, exchange: GradientExchange, name: str, hook: Any) -> None:
    """Gives a parameter's gradient to this exchange; the hook of an exchange that had it before is removed."""
    if parameter in _taken:
        before, whose, its_name = _taken[parameter]
        before.remove()
        if (other := whose()) is not None:
            other.lose(its_name)
    _taken[parameter] = hook, weakref.ref(exchange), name


def is_taken(parameter: torch.Tensor) -> bool:
    """Whether a living DistributedOptimizer exchanges this parameter's gradient."""
    return parameter in _taken and _taken[parameter][1]() is not None


def _set_gradient(parameter: torch.nn.Parameter, result: torch.Tensor) -> None:
    if parameter.grad is None or parameter.grad is result:
        parameter.grad = result
    elif parameter.grad.is_sparse:
        parameter.grad.zero_().add_(result.to_sparse(parameter.grad.sparse_dim()))
    else:
        cast(Any, parameter.grad).set_(result)  # torch's stub lacks set_(Tensor)
