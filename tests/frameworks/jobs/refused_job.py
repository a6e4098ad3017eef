"""Cases of uses that cannot be right, on 2 ranks under torchrun: each is an error, on both ranks alike, that says what to do."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DataParallel, DistributedDataParallel

import grace_ext.frameworks.torch as hvd
from grace_ext.errors import (
    DisagreementError,
    GraceError,
    IncompatiblePartsError,
    NamesError,
    ParameterError,
    PayloadError,
    UnsupportedDtypeError,
    UnsupportedError,
)
from grace_ext.frameworks.torch.transports import DistTransport

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import assert_same, raises, run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
LOCAL = "topk(ratio=0.1) + residual"


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, **options})


def wrap(model, optimizer=None, **options):
    return hvd.DistributedOptimizer(optimizer or sgd(model), model.named_parameters(), compression=TOPK, **options)


def local(model, optimizer=None, **options):
    return hvd.LocalSGD(optimizer or sgd(model), model.named_parameters(), compression=LOCAL, **options)


def used_model():
    """The model without its parameter that never gets a gradient, at which DDP would stumble."""
    model = training.make_model()
    model.unused.requires_grad_(False)
    return model


def hooked(g=TOPK, model=None, optimizer=None, **options):
    ddp = DistributedDataParallel(model or used_model())
    state, hook = hvd.ddp_comm_hook(g, ddp, optimizer, **options)
    ddp.register_comm_hook(state, hook)
    return ddp, state


def train(ddp, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        training.loss_of(ddp, hvd.rank(), step).backward()
        optimizer.step()
    return training.weights_of(getattr(ddp, "module", ddp))


# --- two that exchange the same gradients -----------------------------------------------------------------------------
def case_a_model_in_ddp():
    def ddp_first():
        ddp = DistributedDataParallel(used_model())
        raises(UnsupportedError, "ddp_comm_hook", lambda: wrap(ddp))
        raises(UnsupportedError, "ddp_comm_hook", lambda: wrap(ddp.module))
        raises(UnsupportedError, "LocalSGD", lambda: local(ddp))

    def ddp_second(wrapper):  # told at the first step
        model = used_model()
        optimizer = wrapper(model)
        raises(UnsupportedError, "ddp_comm_hook", lambda: train(DistributedDataParallel(model), optimizer, range(1)))

    ddp_first()
    ddp_second(wrap)
    ddp_second(local)


def case_ddp_inside_a_node_and_local_steps_between():
    """This is right: DDP among other ranks than LocalSGD."""
    mine = [dist.new_group([rank]) for rank in range(2)][hvd.rank()]
    model = used_model()
    optimizer = local(model, every=2)
    ddp = DistributedDataParallel(model, process_group=mine)
    twin = used_model()
    assert_same(train(ddp, optimizer, range(4)), train(twin, local(twin, every=2), range(4)))


def case_a_ddp_hook_and_the_wrapper():
    model = used_model()
    optimizer = wrap(model)
    raises(UnsupportedError, "ddp_comm_hook", lambda: train(hooked(model=model)[0], optimizer, range(1)))


def case_data_parallel():
    raises(UnsupportedError, "one process per device", lambda: wrap(DataParallel(used_model())))


def case_sharded_parameters():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(used_model(), mesh=mesh)
    raises(UnsupportedError, "DTensor", lambda: wrap(model))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    raises(UnsupportedError, "tensor parallelism", lambda: hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0), [("w", parameter)], compression=TOPK))  # fmt: skip


def case_wrapped_twice():
    model = used_model()
    for first in (wrap(model), local(model)):
        for second in (wrap, local):
            raises(UnsupportedError, "twice", lambda first=first, second=second: second(model, first))


def case_zero_redundancy():
    model = used_model()
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.05)
    raises(UnsupportedError, "ddp_comm_hook", lambda: wrap(model, zero))
    raises(UnsupportedError, "ddp_comm_hook", lambda: local(model, zero))
    ddp, _ = hooked()  # the way out
    zero = ZeroRedundancyOptimizer(ddp.parameters(), optimizer_class=torch.optim.SGD, lr=0.05)
    plain, _ = hooked()
    assert_same(train(ddp, zero, range(3)), train(plain, sgd(plain), range(3)))


def case_opacus():
    """Opacus' optimizer wraps another one, and its modules put per-example gradients on the parameters."""

    class DPOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.original_optimizer, self.noise_multiplier = optimizer, 1.0
            self.param_groups = optimizer.param_groups

        def pre_step(self):
            return True

        def step(self):
            if self.pre_step():
                self.original_optimizer.step()

    model = used_model()
    raises(UnsupportedError, "noise", lambda: wrap(model, DPOptimizer(sgd(model))))
    raises(UnsupportedError, "noise", lambda: local(model, DPOptimizer(sgd(model))))
    for overlap in (True, False):
        model = used_model()
        private = DPOptimizer(wrap(model, overlap=overlap))
        for p in model.parameters():
            p.grad_sample = torch.zeros(8, *p.shape)
        raises(UnsupportedError, "grad_sample", lambda m=model, o=private: (training.loss_of(m, hvd.rank(), 0).backward(), o.step()))
    ddp, _ = hooked()
    for p in ddp.parameters():
        p.grad_sample = torch.zeros(8, *p.shape)
    raises(UnsupportedError, "grad_sample", lambda: training.loss_of(ddp, hvd.rank(), 0).backward())


# --- what the wrappers are given --------------------------------------------------------------------------------------
def case_arguments():
    model = used_model()
    g = "topk(ratio=0.1) + residual"
    raises(ParameterError, "model.parameters()", lambda: hvd.DistributedOptimizer(model, compression=g))
    raises(ParameterError, "model.parameters()", lambda: hvd.LocalSGD(model, compression=g))
    raises(ParameterError, "takes a torch.optim.Optimizer", lambda: hvd.DistributedOptimizer("sgd", compression=g))
    import grace_ext

    grc = grace_ext.from_params({"compressor": "topk", "memory": "residual", "communicator": "allgather", "compress_ratio": 0.1})
    raises(ParameterError, "compression=g", lambda: hvd.DistributedOptimizer(sgd(model), grc, named_parameters=model.named_parameters()))
    raises(ParameterError, "compression=g", lambda: hvd.DistributedOptimizer(sgd(model), grace=grc))
    raises(NamesError, "tuples", lambda: hvd.DistributedOptimizer(sgd(model), model.parameters(), compression=g))
    raises(ParameterError, "module second", lambda: hvd.ddp_comm_hook(g, sgd(model)))


def case_every_form_of_a_spec():
    import grace_ext

    g = grace_ext.grace(TOPK)
    for form in (TOPK, g, g.to_config(), g.route, {"compressor": "topk(ratio=0.1)", "memory": "residual"}):
        model = used_model()
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), compression=form)
        assert optimizer._exchange.grace == g, form
        assert hooked(form)[1]._grace == g, form
        assert local(model)._local.worker.settings.grace.memory == g.memory
    raises(GraceError, "compression", lambda: hvd.DistributedOptimizer(sgd(model), model.named_parameters(), compression=3))


def case_memories_that_need_the_optimizer():
    for g in ("topk(ratio=0.1) + dgc", "topk(ratio=0.1) + gradient_compression", "efsignsgd + efsignsgd"):
        raises(UnsupportedError, "optimizer=optimizer", lambda g=g: hooked(g))
    model = used_model()
    raises(IncompatiblePartsError, "applied twice", lambda: hooked("topk(ratio=0.1) + dgc", model, sgd(model, momentum=0.9)))
    ddp, _ = hooked("topk(ratio=0.1) + dgc", model, lambda: optimizer)
    optimizer = sgd(ddp, momentum=0.9)
    raises(IncompatiblePartsError, "applied twice", lambda: train(ddp, optimizer, range(1)))
    model = used_model()
    ddp, _ = hooked("topk(ratio=0.1) + dgc", model, sgd(model))
    train(ddp, sgd(ddp), range(2))


# --- DDP hooks --------------------------------------------------------------------------------------------------------
def case_ddp_that_takes_no_hook():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = used_model()
    _apply_optimizer_in_backward(torch.optim.SGD, [p for p in model.parameters() if p.requires_grad], {"lr": 0.05})
    ddp = DistributedDataParallel(model)
    raises(UnsupportedError, "step the optimizer after backward()", lambda: hvd.ddp_comm_hook(TOPK, ddp))
    ddp, _ = hooked()
    raises(UnsupportedError, "one hook only", lambda: hvd.ddp_comm_hook(TOPK, ddp))
    ddp = DistributedDataParallel(used_model())
    ddp.mixed_precision = object()  # DDP itself accepts a real one on accelerators only
    raises(UnsupportedError, "mixed_precision", lambda: hvd.ddp_comm_hook(TOPK, ddp))
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        ddp = DistributedDataParallel(used_model())
        raises(UnsupportedError, "ddp_optimizer", lambda: hvd.ddp_comm_hook(TOPK, ddp))
    finally:
        torch._dynamo.config.optimize_ddp = True


def case_a_hook_registered_in_one_call():
    """compress_ddp takes a DDP, as Accelerate's `prepare` returns it, whether the user has compiled it or not."""
    raises(ParameterError, "accelerator.prepare", lambda: hvd.compress_ddp(TOPK, used_model()))
    expected = train(other := hooked()[0], sgd(other), range(3))
    for compiled in (False, True):
        ddp = DistributedDataParallel(used_model())
        model = torch.compile(ddp, backend="eager") if compiled else ddp
        optimizer = sgd(ddp)
        state = hvd.compress_ddp(TOPK, model, optimizer)
        assert_same(train(ddp, optimizer, range(3)), expected)
        assert 0 < state.wire_bytes < 4 * sum(p.numel() for p in ddp.parameters())


def case_complex_parameters_in_ddp():
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    ddp = DistributedDataParallel(model)
    raises(UnsupportedDtypeError, "view_as_complex", lambda: hvd.ddp_comm_hook(TOPK, ddp))


def case_copies_of_a_hooked_ddp():
    """Averages of weights copy the DDP, and torch.save pickles it; the copy has no memory, and the original goes on."""
    ddp, state = hooked()
    optimizer = sgd(ddp)
    train(ddp, optimizer, range(2))
    averaged = torch.optim.swa_utils.AveragedModel(ddp)
    averaged.update_parameters(ddp)
    file = io.BytesIO()
    torch.save(ddp, file)
    file.seek(0)
    torch.load(file, weights_only=False)
    copy.deepcopy(ddp)
    twin, _ = hooked()
    assert_same(train(ddp, optimizer, range(2, 4)), train(twin, sgd(twin), range(4)))


def case_undo_in_ddp():
    twin, _ = hooked()
    expected = train(twin, sgd(twin), range(4))
    ddp, state = hooked(revocable=True)
    optimizer = sgd(ddp)
    train(ddp, optimizer, range(2))
    training.loss_of(ddp, hvd.rank(), 50).backward()  # a spike
    state.undo()
    assert_same(train(ddp, optimizer, range(2, 4)), expected)
    training.loss_of(ddp, hvd.rank(), 51).backward()
    if hvd.rank() == 0:
        state.undo()
    raises(PayloadError, "discard() or undo()", lambda: train(ddp, optimizer, range(4, 5)))
    raises(UnsupportedError, "revocable=True", hooked()[1].undo)


def case_ddp_whose_ranks_start_differently():
    def differing(**options):
        model = used_model()
        with torch.no_grad():
            model[3].bias += hvd.rank()
        ddp = DistributedDataParallel(model, init_sync=False)
        ddp.register_comm_hook(*hvd.ddp_comm_hook(TOPK, ddp, **options))
        return ddp

    ddp = differing()
    raises(DisagreementError, "3.bias", lambda: training.loss_of(ddp, hvd.rank(), 0).backward())
    ddp = differing(check_start=False)
    training.loss_of(ddp, hvd.rank(), 0).backward()


# --- engines ----------------------------------------------------------------------------------------------------------
def case_the_pairwise_path_of_gloo_is_used():
    """Whatever way the process group was made: two ranks on Gloo send each other their payloads by one sum."""
    from grace_ext.frameworks.torch.devices import ops_for

    for backend in (None, "gloo", "cpu:gloo"):
        group = dist.new_group(backend=backend)
        assert DistTransport(ops_for(torch.device("cpu")), group).by_gloo, backend
    assert wrap(used_model())._exchange.session.driver.transport.by_gloo


if __name__ == "__main__":
    dist.init_process_group()  # no backend named
    hvd.init()
    run_cases(hvd, globals())
