"""Cases of state, bytes and errors of `ddp_comm_hook` on 2 ranks under torchrun, and `alone` on one rank."""

from __future__ import annotations

import gc
import io
import math
import weakref

import torch
import torch.distributed as dist
from ddp_setup import (
    EACH_ALONE,
    POWERSGD,
    TOPK,
    Layers,
    assert_same,
    in_cluster,
    layers_loss,
    raises,
    run_cases,
    sgd,
    train,
    training,
    weights_of,
    wrap,
)
from torch.nn.parallel import DistributedDataParallel

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import DisagreementError, GraceError, NamesError, UnsupportedError


def case_overlaps_after_the_layout_is_known():
    ddp, _, calls = wrap(Layers())
    train(ddp, layers_loss, range(3))
    assert calls[0] == (0, True, 0)  # the first step has one bucket, and starts nothing before the agreement
    assert [under_way for _, _, under_way in calls[1:9]] == [0] * 8  # the buckets are rebuilt; the end of the step resets the count to 0
    assert [under_way for _, _, under_way in calls[9:]] == [1, 2, 3, 4, 5, 6, 7, 0]


def case_overlaps_with_tensors_of_all_sizes_in_a_bucket():
    torch.manual_seed(3)
    pairs = [(torch.nn.LayerNorm(200, bias=False), torch.nn.Linear(200, 200, bias=False)) for _ in range(3)]  # 800 and 160,000 bytes
    model = torch.nn.Sequential(*[layer for pair in pairs for layer in pair])  # the gradient of the large tensor is ready first
    ddp, state, calls = wrap(model, bucket_cap_mb=160_400 / 2**20)
    train(ddp, lambda model, rank, step: model(torch.full((4, 200), 0.1 * (rank + step + 1))).square().mean(), range(3))
    assert {len(bucket.names) for bucket in state._made.driver.buckets} == {2}
    assert [under_way for _, _, under_way in calls[-3:]] == [1, 2, 0], calls


def case_bytes():
    ddp, state, _ = wrap(Layers(), bucket_cap_mb=25)
    train(ddp, layers_loss, range(3))
    _, expected = in_cluster(Layers, layers_loss, range(3))
    assert state.wire_bytes == expected[hvd.rank()], (state.wire_bytes, expected)


def case_a_threshold_by_the_size_of_the_model():
    """k is for the whole model, although each layer has a bucket of its own."""
    ddp, state, _ = wrap(Layers(), g="threshold(like_topk=1) + residual")
    got, each = train(ddp, layers_loss, range(4)), [p.numel() for p in ddp.module.parameters()]
    assert len(state._made.driver.buckets) == len(each) > 1
    specs = [f"threshold(threshold={1 / (2 * math.sqrt(k))!r}) + residual" for k in (sum(each), each[0])]
    expected, by_bucket = (in_cluster(Layers, layers_loss, range(4), spec)[0] for spec in specs)
    assert_same(got, expected)
    assert any((expected[name] != by_bucket[name]).any() for name in expected)  # so it matters


def case_metrics():
    ddp, state, _ = wrap(Layers())
    assert state.metrics() == {}
    hvd.MetricsHook(state, every=2)
    got = train(ddp, layers_loss, range(4))
    assert_same(got, in_cluster(Layers, layers_loss, range(4))[0])
    report = state.metrics()
    assert report["step"] == 3 and report["measured_at"] == 2 and report["total"]["bytes"] == state.wire_bytes
    assert len(report["parameters"]) == 8 and 0 < report["total"]["relative_error"] < 1


def case_module_given_before_it_is_wrapped():
    model = Layers()
    state, hook = hvd.ddp_comm_hook(TOPK, model)
    ddp = DistributedDataParallel(model, bucket_cap_mb=EACH_ALONE)
    ddp.register_comm_hook(state, hook)
    assert_same(train(ddp, layers_loss, range(4)), in_cluster(Layers, layers_loss, range(4))[0])


def case_resume():
    for g in (TOPK, POWERSGD):
        expected = train(wrap(Layers(), g)[0], layers_loss, range(6))
        ddp, state, _ = wrap(Layers(), g)
        train(ddp, layers_loss, range(3))
        saved = io.BytesIO()
        torch.save({"model": ddp.module.state_dict(), "exchange": state.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved)
        model = Layers()
        model.load_state_dict(loaded["model"])
        ddp, state, _ = wrap(model, g)
        state.load_state_dict(loaded["exchange"])
        assert_same(train(ddp, layers_loss, range(3, 6)), expected)
        raises(GraceError, "saved with", lambda: wrap(Layers(), "qsgd")[1].load_state_dict(loaded["exchange"]))  # noqa: B023


def case_not_finite():
    ddp, state, _ = wrap(Layers())
    train(ddp, layers_loss, range(2))
    before = state.state_dict()
    ddp.zero_grad()
    (layers_loss(ddp, hvd.rank(), 9) * (float("inf") if hvd.rank() == 1 else 1)).backward()
    assert all(bool(torch.isnan(p.grad).all()) for p in ddp.parameters())
    after = state.state_dict()
    assert after["step"] == before["step"] + 1
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    train(ddp, layers_loss, range(1))


def case_learning_rate():
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ddp = DistributedDataParallel(model)
    state, hook = hvd.ddp_comm_hook(TOPK, ddp, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    assert state._session().driver.read_lr() == 0.25
    assert hvd.ddp_comm_hook(TOPK, ddp)[0]._session().driver.read_lr() is None


def case_a_group_of_one_is_left_alone():
    alone = [dist.new_group([rank]) for rank in range(2)][hvd.rank()]
    ddp, state, _ = wrap(Layers(), TOPK, process_group=alone)
    twin = Layers()
    got = train(ddp, layers_loss, range(2))
    for step in range(2):
        optimizer = sgd(twin)
        optimizer.zero_grad()
        layers_loss(twin, hvd.rank(), step).backward()
        optimizer.step()
    assert_same(got, weights_of(twin))
    assert state.wire_bytes == 0


def case_is_freed():
    ddp, state, _ = wrap(Layers())
    train(ddp, layers_loss, range(2))
    watch = weakref.ref(state)
    del ddp, state, _
    gc.collect()
    assert watch() is None


def case_refuses():
    from torch.distributed.fsdp import fully_shard

    sharded = torch.nn.Linear(8, 8)
    fully_shard(sharded)
    raises(UnsupportedError, "DTensor", lambda: hvd.ddp_comm_hook(TOPK, sharded))
    two = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    raises(UnsupportedError, "several devices", lambda: hvd.ddp_comm_hook(TOPK, two))
    ddp = DistributedDataParallel(Layers())
    other = dist.new_group([0, 1])
    raises(UnsupportedError, "not wrapped yet", lambda: hvd.ddp_comm_hook(TOPK, ddp, process_group=other))
    ddp.register_comm_hook(*hvd.ddp_comm_hook(TOPK, Layers()))
    raises(NamesError, "not one of the module's", lambda: train(ddp, layers_loss, range(1)))
    bag = training.Bag(sparse=True)

    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = bag

        def forward(self, rank, step):
            return self.bag.loss(rank, step)

    sparse, _, _ = wrap(Looks())
    raises(UnsupportedError, "sparse=False", lambda: sparse(hvd.rank(), 0).backward())


def case_disagreement():
    mine = ["topk(ratio=0.1) + residual", "powersgd(rank=4) + residual"][hvd.rank()]
    ddp, _, _ = wrap(Layers(), mine)
    raises(DisagreementError, "rank 1 uses 'powersgd(rank=4", lambda: train(ddp, layers_loss, range(1)))
    seeded = grace_ext.grace(TOPK, seed=hvd.rank())
    ddp, _, _ = wrap(Layers(), seeded, find_unused_parameters=True)
    raises(DisagreementError, "seed 1", lambda: train(ddp, layers_loss, range(1)))


def case_agreement_between_steps():
    ddp, state, _ = wrap(Layers(), TOPK)
    train(ddp, layers_loss, range(2))
    hvd.check_agreement(state)
    if hvd.rank() == 1:
        with torch.no_grad():
            next(ddp.parameters()).mul_(1.001)
    raises(DisagreementError, "rank 1: 1 of", lambda: hvd.check_agreement(state))


def case_ranks_with_different_bucket_sizes():
    """If DDP rebuilds its buckets, all ranks get those of rank 0; if it keeps the first ones, the agreement of the first step raises."""
    expected, _ = in_cluster(Layers, layers_loss, range(4))
    for caps, last in (((EACH_ALONE, 25), 7), ((25, EACH_ALONE), 0)):
        for options in ({}, {"static_graph": True}, {"static_graph": True, "find_unused_parameters": True}):
            ddp, _, calls = wrap(Layers(), bucket_cap_mb=caps[hvd.rank()], **options)
            assert_same(train(ddp, layers_loss, range(4)), expected)
            assert calls[-1][:2] == (last, True), (caps, options, calls)
        ddp, _, _ = wrap(Layers(), bucket_cap_mb=caps[hvd.rank()], find_unused_parameters=True)
        text = "rank 1 packs the parameters into other buckets than rank 0"
        raises(DisagreementError, text, lambda: train(ddp, layers_loss, range(1)))  # noqa: B023


def alone():
    """One rank does not compress unless simulate=True; but a momentum and a vote stay."""
    dgc, whole = "topk(ratio=0.1) + dgc(masking=False)", "topk(ratio=1) + dgc(masking=False)"
    for simulate, spec, cluster_spec in (
        (False, TOPK, "none"), (True, TOPK, TOPK), (False, "signsgd", "signsgd"), (False, dgc, whole), (True, dgc, dgc),
    ):  # fmt: skip
        ddp = DistributedDataParallel(Layers())
        optimizer = sgd(ddp.module)
        state, hook = hvd.ddp_comm_hook(spec, ddp, simulate=simulate, optimizer=optimizer)
        ddp.register_comm_hook(state, hook)
        weights = train(ddp, layers_loss, range(3), optimizer)
        assert (state.wire_bytes > 0) == (simulate or spec != TOPK)
        cluster, model = grace_ext.LocalCluster(grace_ext.grace(cluster_spec), 1, framework="torch"), Layers()
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad()
            layers_loss(model, 0, step).backward()
            for name, mean in cluster.step([{n: p.grad for n, p in model.named_parameters()}]).items():
                dict(model.named_parameters())[name].grad = mean
            optimizer.step()
        assert_same(weights, weights_of(model))
    print("ALONE ok")


hvd.init()
run_cases(hvd, dict(globals()))
hvd.shutdown()
