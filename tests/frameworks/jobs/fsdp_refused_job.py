"""Cases of the state of `fsdp_hook`, of ranks that disagree, and of uses that are refused, on 4 ranks under torchrun."""

from __future__ import annotations

import gc
import weakref

import torch
from fsdp_setup import (
    MESH,
    POWERSGD,
    REPLICA,
    SHARD,
    TOPK,
    assert_equal,
    hooked,
    hvd,
    in_clusters,
    local_of,
    make_model,
    raises,
    run_cases,
    sgd,
    sharded,
    train,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import grace_ext
from grace_ext.errors import DisagreementError, GraceError, IncompatiblePartsError, ParameterError, UnsupportedError


# --- state --------------------------------------------------------------------------------------------------------------
def case_resume():
    """A state resumes bit for bit, and only on its own shard."""
    for g in (TOPK, POWERSGD):
        model, optimizer, state = hooked(g)
        train(model, optimizer, range(3))
        saved, weights = state.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}
        again, optimizer, state = hooked(g)
        again.load_state_dict(weights)
        state.load_state_dict(saved)
        train(again, optimizer, range(3, 6))
        assert_equal(again, in_clusters(g)[0])
        others = hvd.allgather_object(dict(saved))
        raises(GraceError, "load each on its own rank", lambda: state.load_state_dict(others[hvd.rank() ^ 1]))  # noqa: B023
    raises(UnsupportedError, "hvd.DistributedState(state)", lambda: grace_ext.save(state, "nowhere"))
    raises(UnsupportedError, "hvd.DistributedState(state)", lambda: grace_ext.load(state, "nowhere"))


def case_metrics():
    model, optimizer, state = hooked()
    state.measure(every=1)
    train(model, optimizer, range(3))
    report = state.metrics()
    assert report["total"]["bytes"] == state.wire_bytes and report["total"]["residual_norm"] > 0
    assert set(report["parameters"]) == {name for name, _ in model.named_parameters()}
    assert (report["rank"], report["size"]) == (REPLICA, 2)


def case_is_freed():
    model, optimizer, state = hooked()
    train(model, optimizer, range(2))
    watch = weakref.ref(state)
    del model, optimizer, state
    gc.collect()  # the model, and with it what keeps its state
    gc.collect()
    assert watch() is None


# --- errors -------------------------------------------------------------------------------------------------------------
def differ_on_shard_0(model):
    if hvd.rank() == 2:
        with torch.no_grad():
            local_of(model[2].weight)[0, 0] += 1


def case_replicas_that_start_differently():
    """Only shard 0 differs between the replicas, and all ranks raise."""
    model = sharded(make_model())
    differ_on_shard_0(model)
    _, optimizer, _ = hooked(model=model)
    text = "1 of 6 parameters differ: 2.weight"
    raises(GraceError if SHARD else DisagreementError, text, lambda: train(model, optimizer, range(1)))
    model = sharded(make_model())
    differ_on_shard_0(model)
    _, optimizer, _ = hooked(model=model, check_start=False)
    train(model, optimizer, range(2))


def case_agreement_between_steps():
    model, optimizer, state = hooked()
    train(model, optimizer, range(2))
    hvd.check_agreement(state)
    hvd.check_agreement(state, model)
    differ_on_shard_0(model)
    for more in ((), (model,)):
        raises(GraceError, "1 of 6 parameters differ: 2.weight", lambda: hvd.check_agreement(state, *more))  # noqa: B023


def case_replicas_that_disagree():
    model, optimizer, _ = hooked([TOPK, POWERSGD][REPLICA])
    raises(DisagreementError, "rank 1 uses 'powersgd(rank=2", lambda: train(model, optimizer, range(1)))


def case_sharded_models_that_cannot_be_hooked():
    mesh, shards = MESH["replicate"], MESH["shard"]
    whole_mesh = fully_shard(nn.Linear(4, 4), mesh=MESH)
    raises(UnsupportedError, "mesh=mesh['shard']", lambda: hvd.fsdp_hook(TOPK, whole_mesh, mesh))
    raises(UnsupportedError, "ddp_comm_hook", lambda: hvd.fsdp_hook(TOPK, make_model(), mesh))
    in_part = make_model()
    fully_shard(in_part[0], mesh=shards)
    raises(UnsupportedError, "'2.weight' is whole", lambda: hvd.fsdp_hook(TOPK, in_part, mesh))
    left_out = make_model()
    fully_shard(left_out, mesh=shards, ignored_params=set(left_out[4].parameters()))
    raises(UnsupportedError, "ignored_params", lambda: hvd.fsdp_hook(TOPK, left_out, mesh))
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    empty = fully_shard(empty, mesh=shards)
    raises(UnsupportedError, "to_empty", lambda: hvd.fsdp_hook(TOPK, empty, mesh))
    empty.to_empty(device="cpu")
    hvd.fsdp_hook(TOPK, empty, mesh)
    raises(UnsupportedError, "called for this model before", lambda: hvd.fsdp_hook(TOPK, empty, mesh))


def case_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), process_group=MESH["shard"].get_group())
    raises(UnsupportedError, "fully_shard (FSDP2)", lambda: hvd.fsdp_hook(TOPK, model, MESH["replicate"]))
    optimizer = sgd(model)
    raises(UnsupportedError, "fully_shard (FSDP2)", lambda: hvd.DistributedOptimizer(optimizer, model.named_parameters(), TOPK))


def case_pure_tensor_parallelism():
    model = parallelize_module(make_model(), MESH["shard"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    raises(UnsupportedError, "a mesh of one rank will do", lambda: hvd.fsdp_hook(TOPK, model, MESH["replicate"]))
    optimizer = sgd(model)
    raises(UnsupportedError, "a mesh of one rank will do", lambda: hvd.DistributedOptimizer(optimizer, model.named_parameters(), TOPK))


def case_wrappers_around_a_sharded_model():
    model = sharded(make_model())
    for wrap in (hvd.DistributedOptimizer, hvd.LocalSGD):
        options = {"named_parameters": model.named_parameters(), "compression": TOPK, **({"every": 2} if wrap is hvd.LocalSGD else {})}
        raises(UnsupportedError, "hvd.fsdp_hook(g, model, mesh['replicate']", lambda: wrap(sgd(model), **options))  # noqa: B023
    raises(UnsupportedError, "hvd.fsdp_hook(g, model, mesh['replicate']", lambda: hvd.ddp_comm_hook(TOPK, model))


def case_passes_that_were_not_told():
    """A step of two backward passes, of which the first is for the last layer alone, as in losses that are made in chunks. If they are
    not told, the second exchange would overwrite the result of the first."""

    def passes(model, optimizer, step):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + hvd.rank()))
        hidden = model[3](model[2](model[1](model[0](x))))
        cut = hidden.detach().requires_grad_()
        model[4](cut).square().mean().backward()
        hidden.backward(cut.grad)

    def whole(model, rank, step):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
        return model(x).square().mean()

    def split():
        model = make_model()
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=MESH["shard"])
        return model

    model, optimizer, _ = hooked(model=split())
    raises(GraceError, "give their number as backward_passes_per_step", lambda: passes(model, optimizer, 0))
    told, optimizer, state = hooked(model=split(), backward_passes_per_step=2)
    for step in range(6):
        passes(told, optimizer, step)
        optimizer.step()
    assert_equal(told, in_clusters(loss=whole)[0], 1e-6)
    assert state._made.driver.step == 6
    model, optimizer, _ = hooked(model=split(), backward_passes_per_step=5)
    passes(model, optimizer, 0)
    passes(model, optimizer, 1)
    raises(GraceError, "from one zero_grad() to the next", lambda: passes(model, optimizer, 2))


def case_arguments_of_fsdp_hook():
    model, mesh = sharded(make_model()), MESH["replicate"]
    raises(ParameterError, "takes a module second", lambda: hvd.fsdp_hook(TOPK, sgd(model), mesh))
    for wrong in (MESH, MESH["replicate"].get_group(), None):
        raises(ParameterError, "DeviceMesh of one dimension", lambda: hvd.fsdp_hook(TOPK, model, wrong))  # noqa: B023
    raises(ParameterError, "at least 1", lambda: hvd.fsdp_hook(TOPK, model, mesh, backward_passes_per_step=0))
    raises(ParameterError, "make the optimizer after", lambda: hvd.fsdp_hook(TOPK, model, mesh, sgd(make_model())))
    raises(UnsupportedError, "fully_shard does already", lambda: hvd.fsdp_hook(TOPK + " @ hierarchical", model, mesh))
    momentum = "topk(ratio=0.1) + dgc"
    raises(UnsupportedError, "fsdp_hook(..., optimizer=optimizer)", lambda: hvd.fsdp_hook(momentum, model, mesh))
    raises(IncompatiblePartsError, "applied twice", lambda: hvd.fsdp_hook(momentum, model, mesh, sgd(model, momentum=0.9)))
    raises(UnsupportedError, "LocalSGD", lambda: hvd.fsdp_hook("topk(ratio=0.1) + cser", model, mesh, sgd(model)))
    for late in (False, True):
        model = sharded(make_model())
        optimizer = sgd(model)
        hvd.fsdp_hook(momentum, model, mesh, (lambda: optimizer) if late else optimizer)  # noqa: B023
        train(model, optimizer, range(2))
        assert_equal(model, in_clusters(momentum, range(2))[0])


if __name__ == "__main__":
    run_cases(hvd, dict(globals()))
    hvd.shutdown()
