"""The ways in which torch users exchange gradients, as programs of one rank whose tensors are on the host or on a pretended device.

Each program makes a step for each of the gradients that it gets, and yields what it has made: arrays by name, and whether the memory was
committed; or the error of the step. A stand-in takes the place of what needs memory on a real device: DDP's buckets, and FSDP2's DTensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.futures import Future

from grace_ext import Grace
from grace_ext.driver.driver import Driver
from grace_ext.errors import GraceError
from grace_ext.frameworks.torch import DistributedOptimizer, LocalSGD, ddp, ddp_comm_hook, engine, fsdp, guards, local, session
from grace_ext.frameworks.torch.devices import ops_for
from grace_ext.frameworks.torch.hook_state import HookState
from grace_ext.frameworks.torch.transports import DistTransport, transport_of_its_own
from grace_ext.testing.pretended_device import DEVICE, DeviceTensor, PretendedOps
from grace_ext.testing.worlds import LR, WITH_DEVICE, World

RANKS = 2
HOST, ON_DEVICE = (next(world for world in WITH_DEVICE if world.name == name) for name in ("torch-host", "torch-cuda"))
#: Last first, as DDP does.
BUCKETS = (("large", "bias"), ("matrix",))
SHAPES = {"matrix": (24, 18), "bias": (24,), "large": (70, 90)}

Gradients = Mapping[str, np.ndarray]


class Made(NamedTuple):
    """Holds what one step of one rank has made. error: the class, the rank and the parameter of the exception that it raised."""

    arrays: dict[str, np.ndarray]
    committed: bool
    error: tuple[type, int | None, str | None] | None = None


class Parameters(torch.nn.Module):
    """A model whose gradients are those that its loss is given."""

    def __init__(self, gradients: Gradients, tensor: Callable[[np.ndarray], torch.Tensor]):
        super().__init__()
        for name, gradient in gradients.items():
            self.register_parameter(name, as_parameter(tensor(np.zeros_like(gradient))))

    def loss(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return sum((parameter * gradients[name]).sum() for name, parameter in self.named_parameters() if name in gradients)


class DTensor(DeviceTensor):
    """Stands for a shard of a parameter on the pretended device, by its name as by torch's methods."""

    device_mesh: Any = None

    def to_local(self) -> DeviceTensor:
        return DeviceTensor(self.held)


class Bucket(NamedTuple):
    """Stands for DDP's GradBucket."""

    number: int
    flat: torch.Tensor
    views: list[torch.Tensor]
    whose: list[torch.Tensor]

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return self.number + 1 == len(BUCKETS)

    def buffer(self) -> torch.Tensor:
        return self.flat

    def gradients(self) -> list[torch.Tensor]:
        return self.views

    def parameters(self) -> list[torch.Tensor]:
        return self.whose


class Ranks:
    """Stands for a process set of all ranks."""

    ranks = list(range(RANKS))

    def included(self) -> bool:
        return True

    def size(self) -> int:
        return RANKS


def as_parameter(tensor: torch.Tensor) -> Any:
    """Returns this tensor as a parameter (torch.nn.Parameter would make another DTensor a DeviceTensor)."""
    tensor.requires_grad_(True)
    tensor._is_param = True  # type: ignore[attr-defined]
    return tensor


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR)


# --- the programs -------------------------------------------------------------------------------------------------------
def by_optimizer(
    world: World, g: Grace, steps: Iterator[Gradients], restart: int | None = None, passes: int = 1, **options: Any
) -> Iterator[Made]:
    """restart: the step before which another optimizer loads the state. passes: the number of equal backward passes per step."""
    first = next(steps)
    model = Parameters(first, world.tensor)

    def make() -> Any:
        return DistributedOptimizer(
            sgd(model), model.named_parameters(), g, process_set=Ranks(), backward_passes_per_step=passes, **options
        )

    optimizer = make()
    for step, gradients in enumerate(_with(first, steps)):
        if step == restart:
            optimizer = _resumed(world, optimizer, make)
        optimizer.zero_grad()
        for _ in range(passes):
            model.loss(world.tensors([gradients])[0]).backward()
        yield _made(world, model, optimizer.synchronize, optimizer)
        with optimizer.skip_synchronize():
            optimizer.step()


def by_ddp(
    world: World,
    g: Grace,
    steps: Iterator[Gradients],
    restart: int | None = None,
    used: Callable[[str, int], bool] = lambda name, step: True,
    **options: Any,
) -> Iterator[Made]:
    """restart: the step before which another hook loads the state. used: whether the forward pass uses a parameter, in a step."""
    first = next(steps)
    model = Parameters(first, world.tensor)
    state, hook = ddp_comm_hook(g, model, sgd(model), **options)
    for step, gradients in enumerate(_with(first, steps)):
        if step == restart:
            saved = _on_host(world, state.state_dict())
            state, hook = ddp_comm_hook(g, model, sgd(model), **options)
            state.load_state_dict(saved)
        model.zero_grad()
        model.loss(world.tensors([{name: x for name, x in gradients.items() if used(name, step)}])[0]).backward()
        yield _made(world, model, partial(_through_buckets, model, state, hook), state)


def _through_buckets(model: torch.nn.Module, state: Any, hook: Any) -> None:
    """Does with the gradients what DDP's reducer does at the end of the backward pass."""
    parameters = dict(model.named_parameters())
    buckets = []
    for number, names in enumerate(BUCKETS):
        whose = [parameters[name] for name in names]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in whose]).detach()
        views = [x.view(p.shape) for x, p in zip(flat.split([p.numel() for p in whose]), whose, strict=True)]
        buckets.append(Bucket(number, flat, views, whose))
    futures = [hook(state, bucket) for bucket in buckets]
    for bucket, future in zip(buckets, futures, strict=True):
        assert future.value() is bucket.flat
        for parameter, view in zip(bucket.whose, bucket.views, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(view)


def by_fsdp(world: World, g: Grace, steps: Iterator[Gradients], shards: int = 1) -> Iterator[Made]:
    """The gradients are those of this rank's shards. On the host it would need real DTensors."""
    assert world is ON_DEVICE
    first, mesh = next(steps), init_device_mesh("cpu", (RANKS, shards), mesh_dim_names=("replicate", "shard"))
    model = Parameters(first, lambda array: DTensor(HOST.tensor(array)))
    for parameter in model.parameters():
        parameter.device_mesh = mesh["shard"]
    state = fsdp.fsdp_hook(g, model, mesh["replicate"], sgd(model))
    for gradients in _with(first, steps):
        model.zero_grad()
        loss = model.loss(world.tensors([gradients])[0])
        yield _made(world, model, loss.backward, state)


def by_local_sgd(
    world: World, g: Grace, steps: Iterator[Gradients], restart: int | None = None, every: int | None = 2, **options: Any
) -> Iterator[Made]:
    """Synchronizes at every second step. What it has made are the parameters. restart: the step before which another optimizer loads the
    state."""
    first = next(steps)
    model = Parameters(first, world.tensor)

    def make() -> Any:
        return LocalSGD(sgd(model), model.named_parameters(), g, every=every, process_set=Ranks(), **options)

    optimizer = make()
    for step, gradients in enumerate(_with(first, steps)):
        if step == restart:
            optimizer = _resumed(world, optimizer, make)
        optimizer.zero_grad()
        model.loss(world.tensors([gradients])[0]).backward()
        yield _made(world, model, optimizer.step, optimizer, of=lambda p: p.detach())


WAYS = {"DistributedOptimizer": by_optimizer, "ddp_comm_hook": by_ddp, "fsdp_hook": by_fsdp, "LocalSGD": by_local_sgd}


def _resumed(world: World, optimizer: Any, make: Callable[[], Any]) -> Any:
    """Returns another optimizer, which has loaded the state of this one."""
    saved, another = _on_host(world, optimizer.state_dict()), make()
    another.load_state_dict(saved)
    return another


def _on_host(world: World, saved: Any) -> Any:
    """Returns a state as a file on the host has it."""
    if isinstance(saved, Mapping):
        return {key: _on_host(world, x) for key, x in saved.items()}
    if isinstance(saved, list):
        return [_on_host(world, x) for x in saved]
    assert not isinstance(saved, torch.Tensor) or (saved.device == DEVICE) == (world is ON_DEVICE), saved
    return saved.cpu() if isinstance(saved, torch.Tensor) else saved


def _with(first: Gradients, rest: Iterator[Gradients]) -> Iterator[Gradients]:
    yield first
    yield from rest


def _made(world: World, model: torch.nn.Module, end_step: Callable[[], Any], exchange: Any, of: Any = lambda p: p.grad) -> Made:
    """Ends the step, and returns what it has made."""
    try:
        end_step()
    except GraceError as error:
        return Made({}, False, (type(error), getattr(error, "rank", None), getattr(error, "parameter", None)))
    return Made({name: world.array(of(p)).copy() for name, p in model.named_parameters()}, _driver_of(exchange).committed)


def _driver_of(exchange: Any) -> Driver:
    if isinstance(exchange, HookState):
        return exchange._session().driver
    return exchange._local.worker.for_models if hasattr(exchange, "_local") else exchange._exchange.session.driver


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Puts stand-ins in place of what would ask for a real device, or for a launched job."""

    def pretended(device: torch.device) -> Any:
        return PretendedOps() if device == DEVICE else ops_for(device)

    with contextlib.ExitStack() as stack:
        for place, name, other in (
            (session, "ops_for", pretended),
            (local, "ops_for", pretended),
            (ddp, "Future", lambda devices=None: Future()),
            (engine, "transport", lambda ops, ranks: transport_of_its_own(ops, None)),
            (guards, "gc", SimpleNamespace(get_objects=lambda: [])),  # no DDP is alive, and a search for one takes a second
            (fsdp, "sharded_parameters", lambda model, replicas: dict(model.named_parameters())),
        ):
            stack.enter_context(mock.patch.object(place, name, other))
        yield


@contextlib.contextmanager
def damaged(when: Callable[[int], bool]) -> Iterator[None]:
    """Fills the messages of the ranks for which `when(rank)` is true, behind the header, with ones, before they are sent."""
    start = DistTransport.start

    def damaging(self: DistTransport, collective: Any, name: str) -> Any:
        if when(self.rank) and collective.kind == "allgather" and len(collective.array) > 24:
            array = self.ops.copy(collective.array)
            array[24:] = 255
            collective = collective._replace(array=array)
        return start(self, collective, name)

    with mock.patch.object(DistTransport, "start", damaging):
        yield
