"""Trains with OneBitAdam and compressed momentum on two ranks; run by tests/frameworks/test_onebit_adam.py."""

from __future__ import annotations

import copy
import math

import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import IncompatiblePartsError
from tests.frameworks.support import training
from tests.frameworks.support.cases import assert_same, raises, run_cases

FREEZE, STEPS = 6, 16
SPECS = (
    f"warmup(steps={FREEZE}, then=efsignsgd + momentum_compression)",
    f"warmup(steps={FREEZE}, then=efsignsgd(block=16) + momentum_compression @ reduce_scatter)",
)


def make(model: torch.nn.Module, lr: float = 0.02, freeze_step: float = FREEZE) -> torch.optim.Optimizer:
    return hvd.OneBitAdam(model.parameters(), lr=lr, weight_decay=0.1, freeze_step=freeze_step)


def wrapped(spec: str):
    model = training.make_model()
    return model, hvd.DistributedOptimizer(make(model), model.named_parameters(), compression=spec)


def step(model, optimizer, at: int) -> None:
    optimizer.zero_grad()
    training.loss_of(model, hvd.rank(), at).backward()
    optimizer.step()


def in_cluster(spec: str):
    """Returns the weights that the same ranks have in one process."""
    cluster, model = grace_ext.LocalCluster(grace_ext.grace(spec), hvd.size(), framework="torch"), training.make_model()
    optimizer = make(model)
    for at in range(STEPS):
        by_rank = []
        for rank in range(hvd.size()):
            model.zero_grad()
            training.loss_of(model, rank, at).backward()
            by_rank.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        mean = cluster.step(by_rank)
        for name, p in model.named_parameters():
            p.grad = mean[name]
        optimizer.step()
    return training.weights_of(model)


def case_the_wrapper_equals_local_cluster():
    """Dense and compressed steps give the weights of LocalCluster, bit for bit."""
    for spec in SPECS:
        model, optimizer = wrapped(spec)
        for at in range(STEPS):
            step(model, optimizer, at)
        assert_same(training.weights_of(model), in_cluster(spec))


def case_ddp_equals_local_cluster():
    """The DDP hook works alike. (DDP does not average what no rank used, so this model has nothing unused.)"""
    model = training.make_model()
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make(model)
    ddp.register_comm_hook(*hvd.ddp_comm_hook(SPECS[0], ddp, optimizer))
    for at in range(STEPS):
        step(ddp, optimizer, at)
    wanted = in_cluster(SPECS[0])
    del wanted["unused"]  # weight decay reaches it only where its gradient is a tensor of zeros
    assert_same(training.weights_of(model), wanted)


def case_it_trains():
    """The loss of a regression falls from about 1 to under 0.05 while signs of the momentum are all that is sent."""
    draw = torch.Generator().manual_seed(hvd.rank())
    x = torch.randn(256, 20, generator=draw)
    y = torch.tanh(x @ torch.randn(20, 1, generator=torch.Generator().manual_seed(9)))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = hvd.OneBitAdam(model.parameters(), lr=0.01, freeze_step=40)
    spec = "warmup(steps=40, then=efsignsgd + momentum_compression)"
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=spec)
    losses = []
    for _ in range(250):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[39] > 0.05 and losses[-1] < 0.02, losses[::25]
    assert optimizer.wire_bytes < 4 * sum(p.numel() for p in model.parameters()) / 5
    hvd.check_agreement(optimizer, model)


def case_it_resumes():
    """A state_dict saved among the dense steps, or after them, continues bit for bit in new objects."""
    for spec in SPECS:
        for at in (FREEZE - 2, FREEZE + 3):
            model, optimizer = wrapped(spec)
            for i in range(at):
                step(model, optimizer, i)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            for i in range(at, STEPS):
                step(model, optimizer, i)
            other, resumed = wrapped(spec)
            other.load_state_dict(saved[0])
            resumed.load_state_dict(saved[1])
            for i in range(at, STEPS):
                step(other, resumed, i)
            assert_same(training.weights_of(other), training.weights_of(model))


def case_broadcasting_the_state_is_no_step():
    """Horovod's broadcast of an optimizer without state makes a step of zeros, which would count among the dense ones."""
    model, optimizer = wrapped(SPECS[0])
    hvd.broadcast_parameters(model.state_dict(), 0)
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert {optimizer.state[p]["step"] for p in model.parameters()} == {0}
    for at in range(STEPS):
        step(model, optimizer, at)
    assert_same(training.weights_of(model), in_cluster(SPECS[0]))


def case_what_does_not_fit_is_an_error():
    """Another momentum than the memory's, or compression before the variance is frozen, is an error on every rank; longer dense steps, no
    compression and groups that never freeze are not."""

    def wrap(optimizer, spec):
        model = training.make_model()
        return hvd.DistributedOptimizer(optimizer(model), model.named_parameters(), compression=spec)

    other = lambda model: hvd.OneBitAdam(model.parameters(), betas=(0.8, 0.999), freeze_step=FREEZE)  # noqa: E731
    raises(IncompatiblePartsError, "that of OneBitAdam is 0.8, not 0.9", lambda: wrap(other, SPECS[0]))
    sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    raises(IncompatiblePartsError, "that of SGD is 0, not 0.9", lambda: wrap(sgd, SPECS[0]))
    short = "by_size(large=warmup(steps=5, then=topk + residual), small=none)"
    raises(IncompatiblePartsError, f"compresses after 5: the variance would be that of compressed gradients. Use warmup(steps={FREEZE}",
           lambda: wrap(make, short))  # fmt: skip
    raises(IncompatiblePartsError, "compresses after 0", lambda: wrap(make, "efsignsgd + residual"))
    raises(IncompatiblePartsError, "is the momentum of the training", lambda: wrap(make, "warmup(steps=6, then=topk + dgc)"))
    for spec in ("none", "warmup(steps=9, then=efsignsgd + momentum_compression)", "warmup(steps=6, then=topk + residual)"):
        wrap(make, spec)
    wrap(lambda model: make(model, freeze_step=math.inf), "topk + residual")
    wrap(lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "efsignsgd + momentum_compression")


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
