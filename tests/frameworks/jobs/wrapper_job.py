"""Cases of the wrapper on 2 ranks, under any launcher. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import DisagreementError, NamesError, TensorChangedError, UnsupportedDtypeError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import assert_same, raises, run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"


def wrap(model, g=TOPK, make=training.make_optimizer, **options):
    return hvd.DistributedOptimizer(make(model), named_parameters=model.named_parameters(), compression=grace_ext.grace(g), **options)


def train(model, optimizer, steps=range(4), passes=1):
    for step in steps:
        optimizer.zero_grad()
        for i in range(passes):
            training.loss_of(model, hvd.rank(), passes * step + i).backward()
        optimizer.step()
    return training.weights_of(model)


def plain_run(steps=range(4), g=TOPK, **options):
    model = training.make_model()
    return train(model, wrap(model, g, **options), steps)


def case_backward_passes():
    model = training.make_model()
    got = train(model, wrap(model, backward_passes_per_step=2), range(2), passes=2)
    cluster, twin = grace_ext.LocalCluster(grace_ext.grace(TOPK), 2, framework="torch"), training.make_model()
    optimizer = training.make_optimizer(twin)
    for step in range(2):
        sums = []
        for rank in range(2):
            twin.zero_grad()
            for i in range(2):
                training.loss_of(twin, rank, 2 * step + i).backward()
            sums.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in twin.named_parameters()})
        for name, mean in cluster.step(sums).items():
            dict(twin.named_parameters())[name].grad = mean
        optimizer.step()
    assert_same(got, training.weights_of(twin))


def case_metrics():
    """Metrics change no bit, whether only rank 0 measures, or both ranks do, in which case they also probe the network."""
    with tempfile.TemporaryDirectory() as folder:
        for both in (False, True):
            model = training.make_model()
            optimizer = wrap(model)
            assert optimizer.metrics() == {}
            if both or hvd.rank() == 0:
                metrics = hvd.MetricsHook(optimizer, every=2, jsonl=f"{folder}/lines", tensorboard=folder)
            assert_same(train(model, optimizer), plain_run())
            if both:
                assert metrics._recorders[0]._network is not None
            if both or hvd.rank() == 0:
                report = optimizer.metrics()
                assert (report["step"], report["rank"], report["measured_at"]) == (3, hvd.rank(), 2), report
                assert report["total"]["bytes"] == optimizer.wire_bytes and report["total"]["ratio"] > 1
                assert 0 < report["total"]["relative_error"] < 1 and report["total"]["residual_norm"] > 0
                assert report["total"]["communicate_seconds"] > 0
        if hvd.rank() == 0:
            lines = [json.loads(line) for line in Path(folder, "lines").read_text().splitlines()]
            assert [line["step"] for line in lines] == [0, 2, 0, 2] and {line["rank"] for line in lines} == {0}
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(folder)
            events.Reload()
            assert [e.value for e in events.Scalars("grace/total/bytes")][-1] == optimizer.wire_bytes


def case_too_many_backwards():
    model = training.make_model()
    optimizer = wrap(model)
    training.loss_of(model, hvd.rank(), 0).backward()
    raises(AssertionError, "backward_passes_per_step", lambda: training.loss_of(model, hvd.rank(), 1).backward())
    raises(AssertionError, "zero_grad", optimizer.zero_grad)
    optimizer.discard()
    optimizer.zero_grad()
    assert_same(train(model, optimizer), plain_run())


def case_sum_is_n_times_the_mean():
    gradients = {}
    for op in (hvd.Average, hvd.Sum):
        model = training.make_model()
        optimizer = wrap(model, op=op)
        training.loss_of(model, hvd.rank(), 0).backward()
        optimizer.synchronize()
        gradients[op] = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, mean in gradients[hvd.Average].items():
        assert torch.equal(mean * 2, gradients[hvd.Sum][name]), name


def case_predivide_and_groups_change_nothing():
    expected = plain_run()
    assert_same(plain_run(gradient_predivide_factor=4.0), expected)
    assert_same(plain_run(groups=2), expected)
    model = training.make_model()
    parameters = list(model.parameters())
    assert_same(train(model, wrap(model, groups=[parameters[:2], parameters[2:4]])), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert_same(plain_run(num_groups=3), expected)
    raises(ValueError, "predivide", lambda: plain_run(gradient_predivide_factor=2.0, op=hvd.Sum))
    raises(ValueError, "only appear once", lambda: wrap(model, groups=[parameters[:1], parameters[:1]]))
    raises(ValueError, "groups", lambda: wrap(model, groups="all"))


def case_refused_ops():
    for op, name in ((hvd.Adasum, "Adasum"), (hvd.Min, "Min"), (hvd.Product, "Product")):
        raises(UnsupportedError, name, lambda op=op: wrap(training.make_model(), op=op))


def bag_weights(sparse, g, **options):
    model = training.Bag(sparse)
    optimizer = wrap(model, g, make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), **options)
    for step in range(3):
        optimizer.zero_grad()
        model.loss(hvd.rank(), step).backward()
        optimizer.step()
    return training.weights_of(model)


def case_sparse_embeddings():
    assert_same(bag_weights(True, TOPK, sparse_as_dense=True), bag_weights(False, TOPK))
    exact, sparse = bag_weights(False, "none"), bag_weights(True, TOPK.replace("0.1", "1.0"))
    for name in exact:
        assert np.allclose(exact[name], sparse[name], atol=1e-6), name


def case_process_set():
    alone = hvd.add_process_set([1])
    both = plain_run()
    model = training.make_model()
    got = train(model, wrap(model, process_set=alone, simulate=True))
    if hvd.rank() == 0:  # rank 0 is not in the set and trains on its own gradients
        twin = training.make_model()
        assert_same(got, train(twin, training.make_optimizer(twin)))
    else:
        assert any(got[name].tobytes() != both[name].tobytes() for name in both)
    hvd.remove_process_set(alone)


def case_graphs_in_another_order():
    for g in (TOPK, "powersgd(rank=2) + residual", "threshold(threshold=0.001) + residual"):
        model = training.Shuffled()
        optimizer = wrap(model, g)
        optimizer._exchange.session.driver.bucket_bytes = 3000  # many small buckets, which could get out of order
        for _ in range(4):
            optimizer.zero_grad()
            model.loss(hvd.rank()).backward()
            optimizer.step()
        mine = torch.from_numpy(np.concatenate([w.reshape(-1) for w in training.weights_of(model).values()]))
        assert len(optimizer._exchange.session.driver.buckets) > 2
        everyone = hvd.allgather(mine[None])
        assert torch.equal(everyone[0], everyone[1])


def case_two_models_at_once():
    expected = plain_run(range(3))
    models = [training.make_model(), training.make_model()]
    optimizers = [wrap(model) for model in models]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            training.loss_of(model, hvd.rank(), step).backward()  # the second backward pass runs before the first step
        for optimizer in optimizers:
            optimizer.step()
    for model in models:
        assert_same(training.weights_of(model), expected)


def case_synchronize_and_clip():
    model = training.make_model()
    optimizer = wrap(model)
    training.loss_of(model, hvd.rank(), 0).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = {n: p.grad.clone() for n, p in model.named_parameters()}
    with optimizer.skip_synchronize():
        optimizer.step()
    assert all(torch.equal(p.grad, clipped[n]) for n, p in model.named_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.synchronize()
        optimizer.step()
    assert any("skip_synchronize" in str(w.message) for w in caught)


def case_resume():
    straight = plain_run(range(5))
    model = training.make_model()
    optimizer = wrap(model)
    train(model, optimizer, range(3))
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved)
    other = training.make_model()
    other.load_state_dict(loaded["model"])
    again = wrap(other)
    again.load_state_dict(loaded["optimizer"])
    assert_same(train(other, again, range(3, 5)), straight)


def case_broadcast_state():
    model = training.make_model()
    for p in model.parameters():
        p.data.add_(hvd.rank())
    optimizer = wrap(model)
    optimizer.param_groups[0]["lr"] = 0.05 * (hvd.rank() + 1)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.zero_grad()
    assert_same(train(model, optimizer), plain_run())


def case_looks_like_the_optimizer():
    model = training.make_model()
    optimizer = wrap(model)
    assert isinstance(optimizer, torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert 0 < optimizer.wire_bytes < sum(p.numel() for p in model.parameters()) * 4
    optimizer.zero_grad(set_to_none=True)


def case_not_finite():
    model = training.make_model()
    optimizer = wrap(model)
    train(model, optimizer, range(2))
    before = optimizer.state_dict()["grace_ext"]
    optimizer.zero_grad()
    loss = training.loss_of(model, hvd.rank(), 9)
    (loss * (float("inf") if hvd.rank() == 1 else 1)).backward()
    optimizer.synchronize()
    assert all(bool(torch.isnan(p.grad).any()) for n, p in model.named_parameters() if n != "unused")
    after = optimizer.state_dict()["grace_ext"]
    assert after["step"] == before["step"] + 1
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())


def case_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = torch.nn.Linear(30, 30).to(dtype)
        optimizer = wrap(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 30, dtype=dtype) * (hvd.rank() + 1)).float().square().mean().backward()
            optimizer.step()
        assert model.weight.grad.dtype == dtype
        everyone = hvd.allgather(model.weight.detach().float()[None])
        assert torch.equal(everyone[0], everyone[1])


def case_horovods_own_compression():
    for compression in (None, hvd.Compression.none, hvd.Compression.fp16, TOPK):
        model = training.make_model()
        optimizer = hvd.DistributedOptimizer(training.make_optimizer(model), model.named_parameters(), compression)
        train(model, optimizer, range(1))
    raises(ValueError, "compression", lambda: hvd.DistributedOptimizer(optimizer, model.named_parameters(), 3))


def case_bad_parameters():
    model = training.make_model()
    twice = [*model.named_parameters(), ("0.weight", torch.nn.Parameter(torch.ones(2)))]
    g, inner = grace_ext.grace(TOPK), training.make_optimizer(model)
    raises(NamesError, "0.weight", lambda: hvd.DistributedOptimizer(inner, twice, compression=g))
    some = list(model.named_parameters())[1:]
    raises(NamesError, "lacks 1", lambda: hvd.DistributedOptimizer(inner, some, compression=g))
    whole = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
    inner = torch.optim.SGD([whole], lr=1.0)
    raises(UnsupportedDtypeError, "complex64", lambda: hvd.DistributedOptimizer(inner, [("whole", whole)], compression=g))


def case_changed_tensor():
    layer = torch.nn.Linear(4, 4)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer.named_parameters(), compression=TOPK)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    layer.weight.data, layer.weight.grad = torch.ones(2, 4), None
    layer.bias.data, layer.bias.grad = torch.ones(2), None
    raises(TensorChangedError, "bias", lambda: layer(torch.ones(1, 4)).sum().backward())


def case_disagreement():
    model = training.make_model()
    mine = ["topk(ratio=0.1) + residual", "efsignsgd + residual"][hvd.rank()]
    optimizer = wrap(model, mine)
    training.loss_of(model, hvd.rank(), 0).backward()
    raises(DisagreementError, "rank 1 uses 'efsignsgd + residual @ allgather'", optimizer.step)
    model = training.make_model()
    if hvd.rank() == 1:
        model.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    optimizer = wrap(model)
    training.loss_of(model, hvd.rank(), 0).backward()
    raises(DisagreementError, "extra", optimizer.step)


def case_one_rank_without_compression():  # the last case, because it leaves Horovod's own part of the step unfinished
    model = training.make_model()
    optimizer = hvd.DistributedOptimizer(training.make_optimizer(model), model.named_parameters(), compression=[None, TOPK][hvd.rank()])
    training.loss_of(model, hvd.rank(), 0).backward()
    raises(DisagreementError, "rank 1 uses 'topk(ratio=0.1) + residual @ allgather'", optimizer.step)


hvd.init()
assert hvd.size() == 2
run_cases(hvd, globals())
hvd.shutdown()
