"""Cases of training through DDP with `ddp_comm_hook` on 2 ranks under torchrun; results are compared with those of a LocalCluster."""

from __future__ import annotations

import functools
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from ddp_setup import (
    POWERSGD,
    TOPK,
    Layers,
    assert_same,
    in_cluster,
    layers_loss,
    policies,
    run_cases,
    sgd,
    train,
    training,
    used,
    weights_of,
    without_unused,
    wrap,
)

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.frameworks.torch.ops import TorchOps


def check_spec(g):
    """Trains 20 steps in 6 buckets: gathered payloads must give the same bits, sums may differ in the last bits."""
    ddp, _, calls = wrap(without_unused(), g)
    got = train(ddp, training.loss_of, range(20), training.make_optimizer(ddp.module))
    expected, _ = in_cluster(without_unused, training.loss_of, range(20), g, training.make_optimizer)
    assert max(calls)[0] == 5, calls
    if grace_ext.grace(g).communicator.name != "allreduce" or grace_ext.grace(g).compressor.result == "vote":
        return assert_same(got, expected)
    for name in expected:
        assert np.allclose(got[name], expected[name], rtol=1e-5, atol=1e-7), name


for number, spec in enumerate(training.SPECS):
    globals()[f"case_spec_{number}"] = functools.partial(check_spec, spec)


def case_policies():
    """In 6 buckets, all ranks make the same choices in the same steps as a cluster with one bucket."""
    for g in policies.SPECS:
        ddp, *_ = wrap(without_unused(), g)
        got = train(ddp, training.loss_of, range(12), training.make_optimizer(ddp.module))
        expected, _ = in_cluster(without_unused, training.loss_of, range(12), g, training.make_optimizer)
        for name in expected:
            assert np.allclose(got[name], expected[name], rtol=1e-5, atol=1e-7), (g, name)


def case_powersgd_in_eight_buckets():
    ddp, _, calls = wrap(Layers(), POWERSGD)
    got = train(ddp, layers_loss, range(50))
    expected, _ = in_cluster(Layers, layers_loss, range(50), POWERSGD)
    assert [index for index, *_ in calls[-8:]] == list(range(8))
    for name in expected:
        assert np.abs(got[name] - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name


def case_options_of_ddp():
    expected, _ = in_cluster(Layers, layers_loss, range(6))
    for options in (
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"process_group": dist.new_group([0, 1])},
        {"bucket_cap_mb": 0.005},
        {"bucket_cap_mb": 25},
    ):
        ddp, _, _ = wrap(Layers(), **options)
        assert_same(train(ddp, layers_loss, range(6)), expected)


def case_unused_by_some_or_all_ranks():
    def loss(model, rank, step):
        return layers_loss(model, rank, step, used(rank, step))

    for g in (TOPK, POWERSGD, "signsgd + none"):
        expected, _ = in_cluster(Layers, loss, range(8), g)
        for views in (False, True):
            for set_to_none in (False, True):
                ddp, _, _ = wrap(Layers(), g, find_unused_parameters=True, gradient_as_bucket_view=views)
                got = train(ddp, loss, range(8), set_to_none=set_to_none)
                for name in expected:
                    assert np.allclose(got[name], expected[name], rtol=1e-5, atol=1e-7), (g, views, set_to_none, name)


def case_unused_without_memory_stays_none():
    ddp, _, _ = wrap(training.make_model(), "none", find_unused_parameters=True)
    train(ddp, training.loss_of, range(3))
    assert ddp.module.unused.grad is None


def case_operations_of_other_devices():
    """The operations for GPUs, run on the CPU, give the same results."""
    with mock.patch("grace_ext.frameworks.torch.session.ops_for", TorchOps):
        for g in (TOPK, POWERSGD, "efsignsgd + residual"):
            ddp, state, _ = wrap(Layers(), g)
            got = train(ddp, layers_loss, range(4))
            assert isinstance(state._made.ops, TorchOps)
            expected, _ = in_cluster(Layers, layers_loss, range(4), g)
            for name in expected:
                assert np.allclose(got[name], expected[name], rtol=1e-5, atol=1e-7), (g, name)


def case_no_sync():
    ddp, _, _ = wrap(Layers())
    got = train(ddp, layers_loss, range(3), passes=2)
    assert_same(got, in_cluster(Layers, layers_loss, range(3), passes=2)[0])


class MixedLayers(Layers):
    """Layers in bfloat16, except the first `wide`, which are in float32."""

    def __init__(self, wide):
        super().__init__()
        self.to(torch.bfloat16)
        for part in list(self.parts)[:wide]:
            part.float()

    def forward(self, x, uses=None):
        for part in self.parts:
            x = torch.tanh(part(x.to(part.weight.dtype)))
        return x.float()


def case_bfloat16_and_mixed_dtypes():
    for wide in (0, 4):
        make = functools.partial(MixedLayers, wide)
        for g in (TOPK, POWERSGD):
            ddp, state, _ = wrap(make(), g)
            got = train(ddp, layers_loss, range(6))
            assert {s.dtype for s in state._made.driver.specs.values()} == ({"bfloat16", "float32"} if wide else {"bfloat16"})
            expected, _ = in_cluster(make, layers_loss, range(6), g)
            for name in expected:
                assert np.allclose(got[name], expected[name], rtol=0 if g == TOPK else 1e-2, atol=1e-4), (name, wide, g)


def case_channels_last():
    def loss(model, rank, step):
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(100 * step + rank))
        return model(x).square().mean()

    def make_convolutions():
        torch.manual_seed(2)
        layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 6, 3)]
        return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

    for g in (TOPK, "qsgd(bits=4)"):
        ddp, _, _ = wrap(make_convolutions(), g)
        assert not ddp.module[2].weight.is_contiguous()
        assert_same(train(ddp, loss, range(4)), in_cluster(make_convolutions, loss, range(4), g)[0])


def case_uneven_inputs():
    """In DDP's join(), a rank without data calls the hook with zeros; ranks end with equal weights."""
    ddp, _, _ = wrap(Layers(), POWERSGD)
    optimizer = sgd(ddp.module)
    with ddp.join():
        for step in range(3 + 2 * hvd.rank()):
            optimizer.zero_grad()
            layers_loss(ddp, hvd.rank(), step).backward()
            optimizer.step()
    mine = {n: w.tobytes() for n, w in weights_of(ddp.module).items()}
    assert hvd.allgather_object(mine)[1] == mine


def case_two_modules_in_one_backward():
    expected, _ = in_cluster(Layers, layers_loss, range(3), POWERSGD)
    ddps = [wrap(Layers(), POWERSGD)[0] for _ in range(2)]
    for step in range(3):
        for ddp in ddps:
            ddp.zero_grad()
        sum(layers_loss(ddp, hvd.rank(), step) for ddp in ddps).backward()
        for ddp in ddps:
            sgd(ddp.module).step()
    for ddp in ddps:
        for name, w in weights_of(ddp.module).items():
            assert np.allclose(w, expected[name], rtol=1e-5, atol=1e-7), name


hvd.init()
assert hvd.size() == 2
run_cases(hvd, dict(globals()))
hvd.shutdown()
