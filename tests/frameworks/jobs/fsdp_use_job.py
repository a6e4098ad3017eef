"""Cases of what fully_shard can do, with `fsdp_hook`, on 4 ranks under torchrun."""

from __future__ import annotations

import math

import torch
from fsdp_setup import (
    MESH,
    POWERSGD,
    SHARD,
    TOPK,
    assert_equal,
    assert_memory,
    assert_replicas_equal,
    hooked,
    hvd,
    in_clusters,
    local_of,
    loss_of,
    make_model,
    memory_of,
    raises,
    run_cases,
    sgd,
    sharded,
    train,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from grace_ext.errors import UnsupportedError


# --- what fully_shard can do ------------------------------------------------------------------------------------------
def case_buckets_start_inside_backward():
    model, optimizer, state = hooked()
    state._made.driver.bucket_bytes = 1500
    started = []
    end = state._pass_ended
    state._pass_ended = lambda: (started.append(state._made.driver._next), end())
    train(model, optimizer, range(6))
    assert len(state._made.driver.buckets) > 2
    assert started[0] == 0 and min(started[1:]) >= len(state._made.driver.buckets) - 1, started
    assert_equal(model, in_clusters()[0])


def case_a_threshold_by_the_size_of_the_model():
    """k is for the whole model, of which each rank has a shard."""
    model, optimizer, state = hooked("threshold(like_topk=1) + residual")
    train(model, optimizer, range(6))
    elements = sum(p.numel() for p in make_model().parameters())
    assert state._made.driver.elements == elements > sum(spec.size for spec in state._made.driver.specs.values())
    assert_equal(model, in_clusters(f"threshold(threshold={1 / (2 * math.sqrt(elements))!r}) + residual")[0])


def case_accumulation_without_gradient_sync():
    model, optimizer, _ = hooked()
    for step in range(4):
        optimizer.zero_grad()
        for i in range(3):
            model.set_requires_gradient_sync(i == 2)
            loss_of(model, hvd.rank(), 3 * step + i).backward()
        optimizer.step()
    assert_equal(model, in_clusters(steps=range(4), passes=3)[0], 1e-6)


class Layers(nn.ModuleList):
    """Four layers without bias, of which `uses` are used."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, rank, step, uses):
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        for i in uses:
            x = x + torch.tanh(self[i](x))
        return x.square().mean()


def case_accumulation_of_counted_passes():
    """Of three passes only the last one exchanges, and layers that are not in it take part, too."""

    def loss(model, rank, step):
        return model(rank, step, [0, 1, 2, 3] if step % 3 == 0 else [0, step % 3])

    model, optimizer, state = hooked(model=sharded(Layers()), backward_passes_per_step=3)
    train(model, optimizer, range(4), passes=3, loss=loss)
    assert_equal(model, in_clusters(steps=range(4), passes=3, loss=loss, make=Layers)[0], 1e-5)
    assert state._made.driver.step == 4


def case_accumulation_with_whole_parameters():
    """Parameters stay whole between the passes of a step, as FSDP2 offers it to save gathers, with either way to accumulate."""
    for counted in (False, True):
        model = sharded(make_model(), reshard_after_forward=False)
        model, optimizer, _ = hooked(model=model, backward_passes_per_step=3 if counted else 1)
        for step in range(4):
            optimizer.zero_grad()
            for i in range(3):
                model.set_requires_gradient_sync(counted or i == 2)
                model.set_reshard_after_backward(i == 2)
                model.set_is_last_backward(i == 2)
                loss_of(model, hvd.rank(), 3 * step + i).backward()
            optimizer.step()
        assert_equal(model, in_clusters(steps=range(4), passes=3)[0], 1e-6)


def case_compiled_models():
    for whole_model in (False, True):
        model = make_model()
        for layer in () if whole_model else (model[0], model[2], model[4]):
            layer.compile(backend="aot_eager")
        model = sharded(model)
        called = torch.compile(model, backend="aot_eager") if whole_model else model
        _, optimizer, state = hooked(model=called)
        train(called, optimizer, range(6))
        assert not any("_orig_mod" in name for name in state._made.driver.specs)
        assert_equal(model, in_clusters()[0], 1e-6)


def case_cpu_offload():
    model, optimizer, _ = hooked(model=sharded(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)))
    train(model, optimizer, range(6))
    assert_equal(model, in_clusters()[0])


def case_mixed_precision():
    """Gradients come in the parameters' dtype, float32; the replicas stay equal."""
    for reduce in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
        model, optimizer, state = hooked(POWERSGD, sharded(make_model(), mp_policy=policy))
        train(model, optimizer, range(6))
        assert {spec.dtype for spec in state._made.driver.specs.values()} == {"float32"}
        assert_replicas_equal(model)
        assert_equal(model, in_clusters(POWERSGD)[0], 0.1)


def case_sharded_along_another_dimension():
    def place(parameter):
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else Shard(0)

    for g in (TOPK, POWERSGD):
        model, optimizer, _ = hooked(g, sharded(make_model(), shard_placement_fn=place))
        train(model, optimizer, range(6))
        assert_equal(model, in_clusters(g, dims={"0.weight": 1, "2.weight": 1})[0])


def case_a_shard_mesh_of_one():
    """Four replicas of one rank each; grace_ext.save keeps their memories, as it does for whole models."""
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    model = sharded(make_model(), mesh["shard"])
    optimizer = sgd(model)
    state = hvd.fsdp_hook(TOPK, model, mesh["replicate"], optimizer)
    train(model, optimizer, range(6))
    expected, wire_bytes = in_clusters(shards=1, data=((0,), (1,), (2,), (3,)))
    assert_equal(model, expected)
    assert state.wire_bytes == wire_bytes[0][hvd.rank()]
    assert state._saveable().size == 4


def case_tensor_parallelism_in_a_replica():
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    model = parallelize_module(make_model(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = sharded(model, mesh["shard"])
    optimizer = sgd(model, foreach=False)
    hvd.fsdp_hook(TOPK, model, mesh["replicate"], optimizer)
    rank = mesh["replicate"].get_local_rank()
    train(model, optimizer, range(6), rank=rank)
    dims = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
    assert_equal(model, in_clusters(data=((0,), (1,)), shards=1, tp=2, tp_dims=dims)[0], 1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x):
        return self.out(torch.tanh(self.into(x)))[:, :1]


def case_tied_parameters():
    model, optimizer, state = hooked(model=fully_shard(Tied(), mesh=MESH["shard"]))
    train(model, optimizer, range(6))
    assert set(state._made.driver.specs) == {"into.weight", "into.bias"}
    assert_equal(model, in_clusters(make=Tied)[0])


def case_layers_used_by_some_replicas():
    """A layer that one replica, or none, uses in a step takes part with zeros."""

    def loss(model, rank, step):
        return model(rank, step, [[0, 1, 2, 3], [3, 1]][(rank // 2 + step) % 2] if step not in (2, 4) else [2 + rank // 2])

    for g in (TOPK, POWERSGD, "none"):
        model, optimizer, _ = hooked(g, sharded(Layers()))
        train(model, optimizer, range(6), loss=loss)
        assert_equal(model, in_clusters(g, loss=loss, make=Layers)[0])


def case_gradients_that_are_set_to_zero():
    """With set_to_none=False a layer that is not used in a step still has a gradient, of zeros."""

    def loss(model, rank, step):
        return model(rank, step, [0, 1, 2, 3] if step % 2 else [3, 1])

    model, optimizer, _ = hooked(model=sharded(Layers()))
    for step in range(6):
        optimizer.zero_grad(set_to_none=False)
        loss(model, hvd.rank(), step).backward()
        optimizer.step()
    assert_equal(model, in_clusters(loss=loss, make=Layers)[0])


def case_modules_called_one_by_one():
    """Each module that a script calls by itself is an outermost one for FSDP2, and its last gradients come late."""

    def loss(model, rank, step):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
        return model[4](model[3](model[2](model[1](model[0](x))))).square().mean()

    model = make_model()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=MESH["shard"])
    model, optimizer, _ = hooked(model=model)
    train(model, optimizer, range(6), loss=loss)
    assert_equal(model, in_clusters(loss=loss)[0])


def case_frozen_layers_and_groups():
    """Frozen parameters are left alone; groups may differ. A layer that trains later is an error."""

    def make():
        model = make_model()
        model[0].requires_grad_(False)
        return model

    def grouped(model):
        groups = [{"params": model[2].parameters(), "lr": 0.2}, {"params": model[4].parameters(), "lr": 0.05}]
        return torch.optim.SGD(groups, momentum=0.9)

    model = sharded(make())
    optimizer = grouped(model)
    hvd.fsdp_hook(TOPK, model, MESH["replicate"], optimizer)
    train(model, optimizer, range(6))
    assert_equal(model, in_clusters(make=make, make_optimizer=grouped)[0])
    model[0].requires_grad_(True)
    raises(UnsupportedError, "2 parameters (0.weight, 0.bias) train now", lambda: train(model, optimizer, range(1)))


def case_sums():
    """With average=False and a divide factor of 1 the gradient is the sum over all ranks."""
    model, optimizer, _ = hooked("none", average=False)
    for module in (model, model[0], model[2], model[4]):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # Gloo has no other
    for group in optimizer.param_groups:
        group["lr"] /= 4
    train(model, optimizer, range(4))
    assert_equal(model, in_clusters("none", range(4))[0], 1e-5)


def case_checkpointed_blocks():
    """Activation checkpointing works; with use_reentrant=True only inside what is sharded, else it is an error."""

    class Block(nn.Module):
        def __init__(self, inner, reentrant):
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def blocks(model, reentrant):
        return nn.Sequential(*(Block(layer, reentrant) if len(layer._parameters) else layer for layer in model))

    def loss(model, rank, step):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step + 10 * rank), requires_grad=True)
        return model(x).square().mean()

    expected = {name.replace(".", ".inner."): weight for name, weight in in_clusters(loss=loss)[0].items()}
    for model in (sharded(blocks(make_model(), False)), sharded(blocks(make_model(), True)), blocks(sharded(make_model()), False)):
        model, optimizer, _ = hooked(model=model)
        train(model, optimizer, range(6), loss=loss)
        assert_equal(model, expected)
    model, _, _ = hooked(model=blocks(sharded(make_model()), True))
    x = torch.ones(2, 16, requires_grad=True)
    raises(UnsupportedError, "use_reentrant=False", lambda: model(x).sum().backward())


def case_parameters_that_are_replaced():
    """The exchange goes on with the parameters that load_state_dict(assign=True) puts into the model, and after model.to()."""
    model = sharded(make_model())
    hvd.fsdp_hook(TOPK, model, MESH["replicate"])
    before = dict(model.named_parameters())
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert all(p is not before[name] for name, p in model.named_parameters())
    train(model, sgd(model), range(4))
    assert_equal(model, in_clusters(steps=range(4))[0])
    model = sharded(make_model().double())
    _, optimizer, _ = hooked(model=model)
    model.float()
    train(model, optimizer, range(4))
    assert_equal(model, in_clusters(steps=range(4))[0])


def case_one_replica():
    """One replica exchanges nothing, unless it simulates."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
    for simulate in (False, True):
        model = sharded(make_model(), mesh["shard"])
        optimizer = sgd(model)
        state = hvd.fsdp_hook(TOPK, model, mesh["replicate"], optimizer, simulate=simulate)
        train(model, optimizer, range(2))
        assert (state.wire_bytes > 0) == simulate and (state._made.driver.step == 2) == simulate


# --- steps --------------------------------------------------------------------------------------------------------------
def case_clipping_sees_the_mean():
    model, optimizer, _ = hooked()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, hvd.rank(), step).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.05).full_tensor())
        assert set(hvd.allgather_object(norm)) == {norm}
        optimizer.step()
    assert_replicas_equal(model)


def case_loss_scaling():
    """The memory is in units of the gradient. If one rank's gradient is not finite, all skip the step and no memory changes."""
    model = sharded(make_model())
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    state = hvd.fsdp_hook(TOPK, model, MESH["replicate"], optimizer, scaler)

    def step(number, broken=False):
        optimizer.zero_grad()
        loss = loss_of(model, hvd.rank(), number)
        scaler.scale(loss * (torch.inf if broken and hvd.rank() == 0 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()

    for number in range(3):
        step(number)
    memory, weights = memory_of(state), whole(model)
    step(9, broken=True)
    assert_memory(state, memory)
    assert_equal(model, weights)
    assert scaler.get_scale() == 2.0
    for number in range(3, 6):
        step(number)
    assert_equal(model, in_clusters()[0])


def case_one_shard_is_not_finite():
    """What is not finite on shard 0 alone takes the commit back on shard 1, too."""
    model, optimizer, state = hooked()
    train(model, optimizer, range(2))
    memory, steps = memory_of(state), state._made.driver.step
    give = state._give

    def broken(name, parameter):
        if hvd.rank() == 0 and name == "0.weight":
            local_of(parameter.grad)[0, 0] = torch.nan
        give(name, parameter)

    state._give = broken
    loss_of(model, hvd.rank(), 2).backward()
    state._give = give
    assert_memory(state, memory)
    assert state._made.driver.step == steps + 1 and not state._made.driver.committed
    assert bool(torch.isnan(local_of(model[0].weight.grad)).any()) == (SHARD == 0)
    optimizer.zero_grad()
    train(model, optimizer, range(2, 4))  # the ranks still agree
    assert state._made.driver.committed


def case_undo():
    model, optimizer, state = hooked(revocable=True)
    train(model, optimizer, range(2))
    memory = memory_of(state)
    loss_of(model, hvd.rank(), 9).backward()
    state.undo()
    assert_memory(state, memory)
    train(model, optimizer, range(2, 6))
    assert_equal(model, in_clusters()[0])
    raises(UnsupportedError, "revocable=True to fsdp_hook", hooked()[2].undo)


if __name__ == "__main__":
    run_cases(hvd, dict(globals()))
    hvd.shutdown()
