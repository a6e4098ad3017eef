"""`fsdp_hook`: compresses the gradients of a model that `fully_shard` (FSDP2) has sharded, between its replicas.

A replica is the ranks of one shard mesh, for example those of a node. FSDP2 reduce-scatters gradients inside a replica, and then calls the
post-accumulate-grad hooks of the sharded parameters. So each hook gets this rank's shard of the replica's mean gradient, and hands it to a
session whose ranks are those that hold the same shard of every replica: a rank sends, and remembers, only what belongs to its shards.

The hooks start the buckets that are complete. A callback at the end of the backward pass ends the exchange, so that clipping, loss scalers
and the optimizer see the result. FSDP2 makes its last reduce-scatters, and calls the last hooks, in callbacks of its own, one for each
outermost module that the forward pass has called; all are queued before the first callback runs. So ours, in its turn, queues itself once
more, behind all of them.

With `share_low_rank` the shards of a replica hold the rows of matrices that powersgd compresses as one: they add up inside the replica, on
a process group of their own, what follows from all rows (parts/requests.py, RowSum).

The shards of a replica make one step together. If a gradient of one shard is not finite, a loss scaler skips the step on all of them, so
no shard commits its memory. If the replicas of one shard disagree at the start, all ranks raise.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointFunction

from ...checkpoints.saveable import Saveable
from ...composition.grace import Grace
from ...composition.making import grace
from ...driver.state import check_form
from ...errors import GraceError, ParameterError, UnsupportedError, few
from ...exchange.transport import Transport
from ...parts.tensor import Rows, TensorSpec
from ...privacy.settings import refuse
from ..optimizers import require_optimizer
from .guards import check_not_private, check_parameters, local_of, name_of
from .hook_state import HookState
from .low_rank import check_same_sharing, shared_rows
from .ops import HostOps, TorchOps
from .resharding import Resharding
from .session import Session, check_torch_optimizer
from .shards import ShardRanks, check_sharded, sharded_parameters
from .transports import SingleTransport, transports_among

REENTRANT = (
    "this model uses torch.utils.checkpoint with use_reentrant=True, which runs a backward pass of its own for each checkpointed block, so "
    "the exchange would end with each block: pass use_reentrant=False, which FSDP2 recommends, too"
)
#: By model: the state of its hook, which lives as long as the model.
_states: weakref.WeakKeyDictionary[torch.nn.Module, FSDPState] = weakref.WeakKeyDictionary()


def fsdp_hook(
    g: Any,
    model: torch.nn.Module,
    replicate_mesh: DeviceMesh,
    optimizer: torch.optim.Optimizer | Callable[[], torch.optim.Optimizer] | None = None,
    scaler: Any = None,
    *,
    share_low_rank: bool = False,
    average: bool = True,
    backward_passes_per_step: int = 1,
    simulate: bool = False,
    revocable: bool = False,
    check_start: bool = True,
) -> FSDPState:
    """Makes a model that `fully_shard` (FSDP2) has sharded exchange its gradients between replicas compressed, and returns the state of
    that exchange. Every rank of the job calls it, after fully_shard.

        mesh = init_device_mesh("cuda", (nodes, 8), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])                       # its layers first, as always; not with the whole mesh
        optimizer = torch.optim.AdamW(model.parameters())
        state = hvd.fsdp_hook("topk(ratio=0.01) + residual", model, mesh["replicate"], optimizer)

    g: what grace_ext.grace takes.
    model: the module that fully_shard was called on last, which holds the others.
    replicate_mesh: the mesh of the ranks that hold the same shard of every replica. It has one dimension.
    optimizer: the one that applies the gradients, or a function that returns it. It gives the learning rate, and is checked against
      memories that are the momentum; with parts that need either, leaving it out raises UnsupportedError.
    scaler: the torch.amp.GradScaler that scales the loss, so that the memory is in units of the gradient and not of its scale.
    share_low_rank: True lets powersgd and powersgd_plus compress each matrix as a whole, instead of each shard as a matrix: the shards of
      a replica share Q, so a replica sends r (a + b) floats per matrix and not r (a + S b), with the result of PowerSGD on the whole
      matrix. They add up P and Q inside the replica, three more collectives per bucket. See docs/fsdp.md for what it works with.
    average: False adds the replicas' gradients instead, as a model with set_gradient_divide_factor(1.0) adds those of shards.
    backward_passes_per_step: the number of backward passes that end in a reduce-scatter, whose gradients are summed before an exchange.
      Passes under model.set_requires_gradient_sync(False) do not count: they exchange nothing, and need no setting here.
    simulate: True compresses with one replica, too, to see the effect of compression.
    revocable: keeps the memory of the last step, so that `state.undo()` can restore it. It takes as much memory again.
    check_start: compares the bits of the replicas' parameters at the first step, and raises DisagreementError if they differ.
    """
    chosen = grace(g)
    refuse(chosen.privacy, "fsdp_hook")
    if not isinstance(model, torch.nn.Module):
        raise ParameterError(f"fsdp_hook(g, model, replicate_mesh, optimizer) takes a module second, and got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # a compiled module stands in front of the sharded one
    _check_arguments(chosen, model, replicate_mesh, backward_passes_per_step)
    require_optimizer(chosen, optimizer, "fsdp_hook")
    parameters = sharded_parameters(model, replicate_mesh.mesh.tolist())
    if isinstance(optimizer, torch.optim.Optimizer):
        check_torch_optimizer(chosen, optimizer)
        _check_trains(optimizer, parameters)
    rows = shared_rows(chosen, parameters) if share_low_rank else {}
    made = FSDPState(
        chosen, model, replicate_mesh.mesh.tolist(), optimizer, scaler, revocable, check_start,
        average=average, passes=backward_passes_per_step, simulate=simulate, rows=rows,
    )  # fmt: skip
    _states[model] = made
    return made


def _check_arguments(g: Grace, model: torch.nn.Module, mesh: Any, passes: Any) -> None:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        what = f"a mesh of shape {tuple(mesh.shape)}" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise ParameterError(f"replicate_mesh must be a DeviceMesh of one dimension, mesh['replicate'], and is {what}")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ParameterError(f"backward_passes_per_step must be a whole number, at least 1, got {passes!r}")
    if model in _states:
        raise UnsupportedError("fsdp_hook was called for this model before, and a second hook would exchange its gradients twice")
    if g.two_level:
        raise UnsupportedError(
            f"{g}: 'hierarchical' sums gradients inside a node, which fully_shard does already; use the communicator between the nodes by "
            "itself"
        )


def _check_trains(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    mine = {id(p) for p in parameters.values()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ParameterError(
            "the optimizer has none of the model's parameters. fully_shard replaces parameters: make the optimizer after it, from "
            "model.parameters()"
        )


class ShardedSession(Session):
    """The exchange of one rank's shards. The ranks of a replica decide together whether they may start, and whether they commit.

    rows: by name, the matrices that they exchange as one. sizes: by name, the elements of the whole parameters."""

    def __init__(
        self,
        shards: ShardRanks,
        rows: Mapping[str, Rows],
        sizes: Mapping[str, int],
        read: Callable[[], dict[str, Any]],
        *args: Any,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self._shards, self._rows, self._sizes_of_wholes, self._read = shards, rows, sizes, read

    def agree(self, names: Iterable[str]) -> None:
        self.parameters = self._read()  # FSDP2 may have made new local tensors (model.to, load_state_dict)
        self._shards.together(lambda: Session.agree(self, names), self._shared)

    def _register(self, names: Iterable[str]) -> None:
        names = list(names)
        super()._register(names)
        self.driver.elements = sum(self._sizes_of_wholes[name] for name in names)

    def _spec(self, name: str) -> TensorSpec:
        return dataclasses.replace(super()._spec(name), rows=self._rows.get(name))

    def _shared(self) -> Any:
        """Returns what the shards of a replica must do alike: their shared matrices, by bucket, and how; None if they share none."""
        buckets = [[[s.name, s.whole.shape, s.dtype] for s in bucket.specs] for bucket in self.driver.buckets if bucket.specs[0].rows]
        return [str(self.driver.grace), self.driver.grace.seed, self.driver.step, buckets] if buckets else None

    def compare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shards.together(lambda: Session.compare(self, tensors))

    def finish(
        self, names: Iterable[str], *, commit: bool = True, revocable: bool = False, others_finite: bool = True
    ) -> dict[str, torch.Tensor]:
        if not self.driver.agreed:
            self.agree(names)
        results = super().finish(names, commit=commit, revocable=True, others_finite=others_finite)
        if not self._shards.all(self.driver.committed):
            self.driver.roll_back()
        if not revocable:
            self.driver.forget_before()
        return results

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        saved["shard"] = self._shards.place
        return saved

    def check_state(self, saved: Mapping[str, Any]) -> None:
        self._check_shard(saved)
        super().check_state(saved)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._check_shard(saved)
        super().load_state_dict(saved)

    def _check_shard(self, saved: Any) -> None:
        check_form(saved)
        check_same_sharing(self.driver.grace, saved, self._rows)
        if saved.get("shard", self._shards.place) != self._shards.place:
            raise GraceError(
                f"this state was saved by shard {saved['shard']}, and this rank is shard {self._shards.place}: save the state of every "
                "rank, and load each on its own rank"
            )

    def saveable(self) -> Saveable:
        made = super().saveable()

        def check(states: list[dict[str, Any]]) -> None:
            check_same_sharing(self.driver.grace, states[0], self._rows)
            made.check(states)

        return made._replace(shard=self._shards.place, check=check)


class FSDPState(HookState):
    """The exchange of one sharded model on this rank; `fsdp_hook` makes it."""

    MAKER = "fsdp_hook"

    def __init__(
        self, g: Grace, model: torch.nn.Module, replicas: list[int], optimizer: Any, scaler: Any, revocable: bool, check_start: bool, *,
        average: bool, passes: int, simulate: bool, rows: Mapping[str, Rows],
    ):  # fmt: skip
        super().__init__(g, optimizer, scaler, revocable, check_start)
        self._replicas, self._rows = replicas, rows
        self._passes, self._passed = passes, 0  # backward passes per step, and those of this step that have ended
        self._task: int | None = None  # autograd's number of the backward pass under way
        self._results: dict[str, tuple[int, int] | None] = {}  # by name: the mark of what the last exchange has put into .grad
        self._computed: set[str] = set()  # the names that have a gradient of this step, and of them those that the session has
        self._put: set[str] = set()
        self._parameters = sharded_parameters(model, replicas)  # not the model, which keeps this object (_states)
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._shards = ShardRanks(self._parameters.values())
        self._made = ShardedSession(
            self._shards,
            rows,
            {name: parameter.numel() for name, parameter in self._parameters.items()},
            self._tensors,
            g,
            check_parameters(cast(Any, self._tensors().items())),
            self._transport,
            wrapper=None,
            average=average,
            read_lr=self._read_lr,
            scaler=scaler,
            check_start=check_start,
            compressing=simulate or len(replicas) > 1,
        )
        if simulate or len(replicas) > 1 or g.acts_alone:
            for name, parameter in self._parameters.items():
                self._hook(name, parameter)
            for prefix, module in model.named_modules():
                module.register_load_state_dict_post_hook(self._make_reconnect(prefix))

    def _transport(self, ops: HostOps | TorchOps) -> Transport:
        if len(self._replicas) == 1 and not self._rows:
            return SingleTransport(ops)
        made, *inside = transports_among(ops, self._replicas, *([self._shards.ranks] if self._rows else []))
        for transport in inside:
            made.add_group("rows", transport)
        return made

    def _session(self) -> Session:
        assert self._made is not None
        return self._made

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: local_of(parameter) for name, parameter in self._parameters.items()}

    def _hook(self, name: str, parameter: torch.nn.Parameter) -> None:
        this = weakref.ref(self)

        @torch.compiler.disable
        def hook(parameter: torch.Tensor) -> None:
            if (own := this()) is not None:
                own._take(name, parameter)

        parameter.register_post_accumulate_grad_hook(hook)

    def _make_reconnect(self, prefix: str) -> Callable[[torch.nn.Module, Any], None]:
        """Returns a hook for the end of a module's load_state_dict, which with assign=True has put other parameters in place of these."""
        this = weakref.ref(self)

        def reconnect(module: torch.nn.Module, _: Any) -> None:
            own = this()
            for attribute, parameter in module.named_parameters(recurse=False) if own is not None else ():
                name = name_of(f"{prefix}.{attribute}" if prefix else attribute)
                if own is not None and own._parameters.get(name, parameter) is not parameter:
                    check_sharded(name, parameter, own._replicas)
                    own._parameters[name] = parameter
                    own._hook(name, parameter)

        return reconnect

    def resharding(self, shards: int) -> Resharding:
        """Returns how the memory of this many shards becomes that of this rank's."""
        return Resharding(self._grace, self._parameters, shards, self._rows)

    # --- one step ---------------------------------------------------------------------------------------------------
    def _take(self, name: str, parameter: torch.Tensor) -> None:
        """Takes note of a gradient, and hands it to the session in the last backward pass of a step."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # the first gradient of this backward pass
            _check_not_reentrant()
            self._task = task
            _queue(lambda: _queue(self._pass_ended))
        self._computed.add(name)
        if self._passed + 1 == self._passes:
            self._give(name, parameter)

    def _give(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            raise GraceError(
                f"the gradient of {name!r} was removed between the backward passes of a step: backward_passes_per_step={self._passes} must "
                "be the number of passes from one zero_grad() to the next"
            )
        check_not_private(name, parameter)
        self._put.add(name)
        self._session().put(name, local_of(parameter.grad))

    @torch.compiler.disable
    def _pass_ended(self) -> None:
        self._task = None
        self._passed += 1
        if self._passed < self._passes:
            return
        try:
            self._check_frozen()
            self._check_whole()
            for name in self._parameters:
                if name in self._computed and name not in self._put:  # its last gradient came in an earlier pass
                    self._give(name, self._parameters[name])
            results = self._session().finish(self._parameters, revocable=self._revocable)
            for name, result in results.items():
                _set_gradient(self._parameters[name], result)
                self._results[name] = _mark(self._parameters[name].grad)
        finally:
            self._passed = 0
            self._computed.clear()
            self._put.clear()

    def _check_whole(self) -> None:
        """Raises GraceError if this exchange would overwrite results of the last one: a step has more backward passes than were told."""
        left = {n: p.grad for n, p in self._parameters.items() if n not in self._computed and n in self._results}
        again = [name for name, gradient in left.items() if self._results[name] == _mark(gradient)]
        if again:
            raise GraceError(
                f"{len(again)} parameters ({few(again)}) have no gradient in this backward pass, and still have the result of the last "
                "exchange, which this one would overwrite. If a step has several backward passes, for parts of the model, give their "
                "number as backward_passes_per_step; else call zero_grad() between steps"
            )

    def _check_frozen(self) -> None:
        """Raises UnsupportedError if a parameter trains that did not when the model was hooked."""
        new = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if new:
            raise UnsupportedError(
                f"{len(new)} parameters ({few(new)}) train now that did not when fsdp_hook was called, so their gradients are not "
                "exchanged: call fsdp_hook after layers are unfrozen, on every rank (start the job again from a checkpoint)"
            )


def _queue(callback: Callable[[], None]) -> None:
    """Lets autograd call this at the end of the backward pass under way, after the callbacks that were queued before."""
    cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(callback)


def _check_not_reentrant() -> None:
    """Raises UnsupportedError if this is called in the backward pass of a checkpointed block inside that of the model."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            raise UnsupportedError(REENTRANT)
        frame = frame.f_back


@torch.no_grad()
def _mark(gradient: torch.Tensor | None) -> tuple[int, int] | None:
    """Returns what changes if a gradient is written to, or another takes its place."""
    return None if gradient is None else (local_of(gradient).data_ptr(), gradient._version)


def _set_gradient(parameter: torch.nn.Parameter, result: torch.Tensor) -> None:
    """Puts a result into `.grad`, where it is already if the gradient's memory could be written over."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    own = local_of(parameter.grad)
    if own.data_ptr() != result.data_ptr():
        own.copy_(result)
