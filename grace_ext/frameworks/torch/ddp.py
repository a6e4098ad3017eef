"""`ddp_comm_hook`: the communication hook of DistributedDataParallel, and `compress_ddp`, which also registers it.

DDP packs gradients into buckets, calls the hook for each, in the same order on all ranks, and waits for the futures after the last one.
Torch's own multi-round hooks start a later round in a future's callback. Callbacks run in whatever order the collectives finish, which
differs by rank, and torch.distributed pairs collectives by order: with several buckets, Gloo mixes them up. Here a bucket's first round
starts in its hook, and later rounds in the hook of the last bucket, in the driver's order (driver.py, comments 1-4). Waiting there delays
nothing: when the last bucket is complete, the backward pass has computed everything.

State is kept by parameter name, so it survives when DDP rebuilds its buckets after the first step. The driver's buckets follow DDP's, and
split the large ones. A new layout (first step, first step after the rebuild) is known only at its last bucket, so the buckets that changed
start there.

The agreement of the first step covers the first layout. Later layouts need no agreement: if DDP rebuilds, it broadcasts rank 0's layout to
all. With find_unused_parameters the ranks' first layouts may differ (by bucket_cap_mb), but then DDP never rebuilds.
"""
# No `from __future__ import annotations` here: DDP checks the hook's annotations, and does not accept strings.

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ...composition.grace import Grace
from ...composition.making import grace
from ...errors import GraceError, NamesError, ParameterError, UnsupportedDtypeError, UnsupportedError, few
from ...exchange.transport import Transport
from ...parts.tensor import TensorSpec
from ...privacy.settings import Privacy, check_protects_ranks
from ..optimizers import require_optimizer
from .gradients import is_taken
from .guards import check_alone, check_not_private, check_parameters
from .hook_state import HookState
from .ops import HostOps, TorchOps, describe
from .private import SCALER, check_no_batch_norm
from .session import Session, check_torch_optimizer
from .transports import SingleTransport, transport_of_its_own


def ddp_comm_hook(
    g: Any,
    ddp: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer] | None = None,
    *,
    simulate: bool = False,
    process_group: dist.ProcessGroup | None = None,
    scaler: Any = None,
    revocable: bool = False,
    check_start: bool = True,
    privacy: Privacy | None = None,
) -> tuple["DDPState", Any]:
    """Returns (state, hook) for DDP: `ddp.register_comm_hook(*ddp_comm_hook(g, ddp, optimizer))`. The gradients become the mean over the
    ranks.

    g: what grace_ext.grace takes.
    ddp: the DistributedDataParallel; or, for libraries that wrap the model later (Lightning), the module that will be wrapped.
    optimizer: the one that applies the gradients, or a function that returns it (for libraries that make it later). It gives the learning
      rate, and is checked against memories that are the momentum; with parts that need either, leaving it out raises UnsupportedError.
    simulate: True compresses at world size 1 too, to see the effect of compression without a cluster. Without it a single rank sends
      nothing, but a memory that is the training's momentum keeps it, and votes stay votes.
    process_group: for a module that is not wrapped yet, the group that its DDP will have; None is the default group.
    scaler: the torch.amp.GradScaler that scales the loss, so that the memory is in units of the gradient and not of its scale. The step is
      torch's own: scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update().
    revocable: keeps the memory of the last step, so that `state.undo()` can restore it if that step shall be skipped. It takes as much
      memory again.
    check_start: compares the bits of all ranks' parameters at the first step, and raises DisagreementError if they differ.
    privacy: hvd.Privacy(...) of unit 'rank', which makes each rank's gradient private before it is compressed, in the hook of the last
      bucket (there is no overlap); or `g` has it in front. `state.epsilon(delta)` says what was spent.
    """
    chosen = grace(g).with_privacy(privacy)
    check_protects_ranks(chosen.privacy, "ddp_comm_hook")
    if chosen.privacy is not None and scaler is not None:
        raise UnsupportedError(SCALER)
    if not isinstance(ddp, torch.nn.Module):
        raise ParameterError(f"ddp_comm_hook(g, ddp, optimizer) takes a module second, and got {type(ddp).__name__}")
    ddp = getattr(ddp, "_orig_mod", ddp)  # a compiled module stands in front of the DDP
    _check_takes_hooks(ddp)
    require_optimizer(chosen, optimizer, "ddp_comm_hook")
    if isinstance(optimizer, torch.optim.Optimizer):
        check_torch_optimizer(chosen, optimizer)
    return DDPState(chosen, ddp, optimizer, simulate, process_group, scaler, revocable, check_start), _hook


def compress_ddp(g: Any, ddp: torch.nn.Module, optimizer: Any = None, **options: Any) -> "DDPState":
    """Makes a DistributedDataParallel exchange its gradients compressed, and returns the state of its hook. It registers the hook that
    `ddp_comm_hook` makes, whose arguments it takes. Call it on what a trainer returns: Accelerate, for example, ignores a hook that is a
    function in DistributedDataParallelKwargs(comm_hook=...).

        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        state = hvd.compress_ddp("topk(ratio=0.01) + residual", model, optimizer)

    Raises ParameterError if `ddp` is not (a compiled) DistributedDataParallel, and UnsupportedError if it takes no hook."""
    inner = getattr(ddp, "_orig_mod", ddp)
    if not isinstance(inner, DistributedDataParallel):
        raise ParameterError(
            f"compress_ddp(g, ddp, optimizer) takes a DistributedDataParallel second, and got {type(inner).__name__}: call it after the "
            "trainer has wrapped the model (accelerator.prepare), in a job of more than one process; for Lightning give "
            "DDPStrategy(ddp_comm_state=state, ddp_comm_hook=hook) what ddp_comm_hook returns"
        )
    state, hook = ddp_comm_hook(g, inner, optimizer, **options)
    inner.register_comm_hook(state, hook)
    return state


def _check_takes_hooks(ddp: torch.nn.Module) -> None:
    """Raises UnsupportedError if this is a DDP that has given its only hook away, or that calls no hooks as they are meant."""
    if not isinstance(ddp, DistributedDataParallel):
        return
    taken = "DDP takes one hook, and {} has it: {}"
    if ddp.mixed_precision is not None:
        way_out = "leave it out, and train in torch.autocast, or in bfloat16"
        raise UnsupportedError(taken.format("DistributedDataParallel(mixed_precision=...)", way_out))
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        way_out = "step the optimizer after backward()"
        raise UnsupportedError(taken.format("an optimizer that runs in the backward pass (_apply_optimizer_in_backward)", way_out))
    if ddp._comm_hooks:
        way_out = "register one hook only (and for torchft, use grace_ext.integrations.torchft)"
        raise UnsupportedError(taken.format(f"hook {ddp._comm_hooks[0][0].__qualname__}", way_out))
    if getattr(ddp, "_use_python_reducer", False):
        raise UnsupportedError(
            "torch._dynamo.config.optimize_ddp is 'python_reducer', which traces hooks and cannot trace this one: use 'ddp_optimizer' "
            "(torch's default)"
        )


def _hook(state: "DDPState", bucket: dist.GradBucket) -> Future[torch.Tensor]:
    return state.take(bucket)


class _Taken(NamedTuple):
    """A DDP bucket whose hook was called: its gradients by name, which are views of `buffer`, and `packed`, the names in each of the
    driver's buckets that it is split into."""

    gradients: dict[str, torch.Tensor]
    packed: list[list[str]]
    buffer: torch.Tensor
    future: Future[torch.Tensor]


class DDPState(HookState):
    """The exchange of one DDP module on this rank; `ddp_comm_hook` makes it."""

    MAKER = "ddp_comm_hook"

    def __init__(
        self,
        g: Grace,
        ddp: torch.nn.Module,
        optimizer: Any,
        simulate: bool,
        process_group: Any,
        scaler: Any,
        revocable: bool,
        check_start: bool,
    ):
        wrapped = ddp if isinstance(ddp, DistributedDataParallel) else None
        if wrapped is not None and process_group not in (None, wrapped.process_group):
            raise UnsupportedError(
                "process_group is for modules that are not wrapped yet, and this one is a DDP, whose gradients travel in its own group; "
                "leave process_group out"
            )
        super().__init__(g, optimizer, scaler, revocable, check_start)
        self._simulate = simulate
        self._group: Any = process_group if wrapped is None else wrapped.process_group
        # DDP's reducer owns this object, so a strong reference to the module would keep both for ever.
        self._ddp: Callable[[], DistributedDataParallel | None] = (lambda: None) if wrapped is None else weakref.ref(wrapped)
        module: Any = ddp if wrapped is None else wrapped.module
        self._parameters = check_parameters(module.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._taken: list[_Taken] = []
        self._put = 0  # how many of _taken the driver has
        if wrapped is not None and dist.is_initialized():
            self._session()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy of the DDP keeps of its hook's state: a copy (a file, an average of weights) is no rank of this exchange."""
        return self._grace.to_config()

    def __setstate__(self, config: dict[str, Any]) -> None:
        self.__init__(grace(config), torch.nn.Module(), None, False, None, None, False, True)  # type: ignore[misc]

    def _tensors(self) -> Mapping[str, torch.Tensor]:
        return self._parameters

    def _session(self) -> Session:
        """Returns the session. It is made at first use, because a module may be passed before there is a process group, or before it is
        on its device."""
        if self._made is None:
            self._check_world()
            check_parameters(self._parameters.items())  # checks again: it may be on several devices now
            self._made = Session(
                self._grace,
                self._parameters,
                self._transport,
                wrapper=None,
                average=True,
                read_lr=self._read_lr,
                scaler=self._scaler,
                check_start=self._check_start,
                compressing=self._compresses(),
            )
            self._attach(self._made.driver)
        return self._made

    def _check_world(self) -> None:
        """Raises GraceError if the ranks that exchange gradients cannot be known yet."""
        if not dist.is_initialized():
            raise GraceError("there is no process group yet; call torch.distributed.init_process_group() first")
        if dist.get_world_size() == 1:
            check_alone("torch")

    def _compresses(self) -> bool:
        """Whether gradients are compressed: there are other ranks, or it is a simulation."""
        return self._simulate or dist.get_world_size(self._group) > 1

    def _transport(self, ops: HostOps | TorchOps) -> Transport:
        if dist.get_world_size(self._group) == 1:
            return SingleTransport(ops)
        return transport_of_its_own(ops, self._group)

    # --- one step ---------------------------------------------------------------------------------------------------
    def take(self, bucket: dist.GradBucket) -> Future[torch.Tensor]:
        """The hook: takes one bucket. With the last bucket the step ends, and all futures get their results."""
        buffer = bucket.buffer()
        future: Future[torch.Tensor] = Future() if buffer.device.type == "cpu" else Future(devices=[buffer.device])
        if not self._compresses() and not self._grace.acts_alone:
            future.set_result(buffer)
            return future
        if buffer.is_sparse:
            raise UnsupportedError("DDP has a bucket of sparse gradients, which this hook does not compress; use Embedding(sparse=False)")
        if bucket.index() == 0:
            self._taken, self._put = [], 0  # an exception in a backward pass may have left some
        self._check_taken_once()
        session, gradients = self._session(), self._gradients(bucket)
        packed = session.driver.packed({name: gradient.nbytes for name, gradient in gradients.items()})
        self._taken.append(_Taken(gradients, packed, buffer, future))
        if self._put == bucket.index() and self._as_before(session) and self._grace.privacy is None:
            self._give(session, {})
        if bucket.is_last():
            self._finish(session)
        return future

    def _gradients(self, bucket: dist.GradBucket) -> dict[str, torch.Tensor]:
        found = {}
        for parameter, flat in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names.get(id(parameter))
            if name is None:
                raise NamesError(
                    f"DDP has a parameter of shape {list(parameter.shape)} that is not one of the module's that ddp_comm_hook was given; "
                    "call ddp_comm_hook with the module that this DDP wraps, after the module's parameters were made"
                )
            if flat.dtype != parameter.dtype:
                raise UnsupportedDtypeError(
                    f"DDP gives the gradient of {name!r}, which is {parameter.dtype}, as {flat.dtype}; grace_ext compresses gradients of "
                    "the parameter's own real dtype"
                )
            check_not_private(name, parameter)
            # DDP keeps elements in the parameter's memory order (for example channels_last), but presents them as if in row order.
            dense = parameter.numel() == 1 + sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True))
            strides = parameter.stride() if dense and parameter.numel() else flat.stride()
            found[name] = flat.as_strided(flat.shape, strides, flat.storage_offset())
        return found

    def _as_before(self, session: Session) -> bool:
        """Whether the bucket just taken holds the same parameters as the driver's buckets at its place."""
        *before, last = self._taken
        place = sum(len(taken.packed) for taken in before)
        there = session.driver.buckets[place : place + len(last.packed)]
        return [bucket.names for bucket in there] == [set(names) for names in last.packed]

    def _give(self, session: Session, private: Mapping[str, torch.Tensor]) -> None:
        """Hands the next bucket to the driver, which starts it (at the very first step it only keeps it). private: the gradients to take in
        place of DDP's."""
        for name, gradient in self._taken[self._put].gradients.items():
            session.put(name, private.get(name, gradient))
        self._put += 1

    def _private(self, session: Session) -> dict[str, torch.Tensor]:
        """Returns private gradients of all parameters; none if privacy was not asked for. The clip needs the norm of all of them."""
        if self._grace.privacy is None:
            return {}
        if not session.driver.agreed:
            check_no_batch_norm(self._parameters)
        return session.driver.privatize({name: x for taken in self._taken for name, x in taken.gradients.items()}, session.driver.specs)

    def _finish(self, session: Session) -> None:
        try:
            self._follow(session)
            private = self._private(session)
            while self._put < len(self._taken):
                self._give(session, private)
            results = session.finish((), revocable=self._revocable)
            for taken in self._taken:
                for name, gradient in taken.gradients.items():
                    gradient.copy_(results[name])
            ddp = self._ddp()
            if ddp is None or ddp.find_unused_parameters or ddp.static_graph:
                self._keep_unused()
            for taken in self._taken:
                taken.future.set_result(taken.buffer)
        finally:
            self._taken, self._put = [], 0

    def _check_taken_once(self) -> None:
        twice = [name for name, p in self._parameters.items() if is_taken(p)] if self._made is None or not self._made.driver.agreed else []
        if twice:
            raise UnsupportedError(
                f"hvd.DistributedOptimizer and ddp_comm_hook both exchange {len(twice)} parameters ({few(twice)}): step the plain "
                "optimizer, or leave DDP out"
            )

    def _follow(self, session: Session) -> None:
        """Regroups the driver's buckets by DDP's, if they differ."""
        driver, every = session.driver, {name: x for taken in self._taken for name, x in taken.gradients.items()}
        if not driver.specs:
            driver.register(TensorSpec(name, *describe(every[name])) for name in self._parameters if name in every)
        layout = [names for taken in self._taken for names in taken.packed]
        if [set(names) for names in layout] != [bucket.names for bucket in driver.buckets]:
            driver.regroup(layout)

    def _keep_unused(self) -> None:
        """Puts results into `.grad` itself, because DDP discards the result for a parameter that no rank used in this step. Such a result
        may hold what a memory kept from earlier steps and now counts as sent. If a rank did use the parameter, DDP writes the same values
        again."""
        for_all = [(self._parameters[name], result) for taken in self._taken for name, result in taken.gradients.items()]
        # With gradient_as_bucket_view gradients are views of the bucket, and DDP requires them there.
        views = any(p.grad is not None and p.grad.data_ptr() == result.data_ptr() for p, result in for_all)
        unused = [result for parameter, result in for_all if parameter.grad is None]
        holds = iter(torch.stack([result.any() for result in unused]).tolist() if unused else ())  # read at once: a device waits for each
        for parameter, result in for_all:
            if parameter.grad is None:
                if next(holds):  # else it stays None, as without a hook
                    parameter.grad = result if views else result.clone()
            elif parameter.grad.data_ptr() != result.data_ptr():
                parameter.grad.copy_(result)
