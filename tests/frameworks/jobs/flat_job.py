"""Makes and drops 50 of each torch wrapper, on 2 ranks under any launcher. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import grace_ext
import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import run_cases  # noqa: E402
from flat import MODEL, assert_flat  # noqa: E402

SPEC = "topk(ratio=0.01) + residual"


def made():
    torch.manual_seed(1)
    model = torch.nn.Linear(MODEL // 4 // 64, 64)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, MODEL // 4 // 64)).square().sum().backward()
        optimizer.step()


def case_distributed_optimizer():
    def use():
        model, plain = made()
        train(model, hvd.DistributedOptimizer(plain, model.named_parameters(), SPEC))
        return weakref.ref(model)

    assert_flat(use)


def case_local_sgd():
    def use():
        model, plain = made()
        train(model, hvd.LocalSGD(plain, model.named_parameters(), SPEC, every=2))
        return weakref.ref(model)

    assert_flat(use)


def case_ddp_hook():
    def use():
        model, plain = made()
        ddp = DistributedDataParallel(model)
        hvd.compress_ddp(SPEC, ddp, plain)
        train(ddp, plain)
        return weakref.ref(model)

    if dist.is_initialized():
        assert_flat(use)


def case_bind():
    def use():
        model, plain = made()
        bound = grace_ext.grace(SPEC).bind(model.named_parameters(), optimizer=plain)
        train(model, horovod.DistributedOptimizer(plain, model.named_parameters(), compression=bound))
        return weakref.ref(bound)

    if not dist.is_initialized():
        import horovod.torch as horovod

        assert_flat(use)


if __name__ == "__main__":
    hvd.init()
    torch.set_num_threads(1)
    run_cases(hvd, globals())
