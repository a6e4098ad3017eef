"""Cases of LocalSGD for torch on 2 ranks, under any launcher. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import io
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import DisagreementError, GraceError, IncompatiblePartsError, NamesError, RankLeftError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.frameworks.support import local_training, training  # noqa: E402
from tests.frameworks.support.cases import assert_same, raises, run_cases  # noqa: E402
from tests.frameworks.support.local_training import QSPARSE, make_optimizer, run, train  # noqa: E402

#: One policy that goes by the name, and one that learns; both decide otherwise within a few synchronizations.
BY_NAME = f"by_name({{'*.bias': none}}, default={QSPARSE})"
LEARNING = f"accordion(high=lgreco(base=topk(ratio=0.1) + residual, every=2, window=1), low={QSPARSE}, interval=2)"


def same_on_all_ranks(model):
    mine = b"".join(w.tobytes() for w in training.weights_of(model).values())
    return len(set(hvd.allgather_object(mine))) == 1


def case_every_step_without_loss_is_data_parallel_training():
    model = training.make_model()
    plain = hvd.DistributedOptimizer(make_optimizer(model, "none"), model.named_parameters(), compression=grace_ext.grace("none"))
    run(hvd, model, plain, range(6))
    local, _ = train(hvd, "none", 6, every=1)
    assert_same(training.weights_of(local), training.weights_of(model))


def case_the_clusters_bits():
    for spec, options in (
        ("none", {"every": 3}),
        (QSPARSE, {"every": 3}),
        (QSPARSE, {"schedule": [1, 2, 5, 9]}),
        ("efsignsgd + residual", {"schedule": lambda step: step % 4 == 1, "max_gap": 10}),
        ("none", {"every": 2, "outer_lr": 0.7, "outer_momentum": 0.9}),
        (QSPARSE, {"schedule": hvd.post_local(start=4, every=3)}),
        ("topk(ratio=0.1) + cser(reset_period=4)", {}),
        (BY_NAME, {"every": 3}),
        (LEARNING, {"every": 1}),
        (f"warmup(steps=2, then={LEARNING})", {"every": 2, "outer_lr": 0.7, "outer_momentum": 0.9}),
    ):
        model, optimizer = train(hvd, spec, 10, **options)
        assert_same(training.weights_of(model), local_training.train_in_cluster(spec, 2, 10, **options)[hvd.rank()])
        optimizer.sync()
        assert same_on_all_ranks(model), spec


def case_bytes_are_sent_when_it_is_due():
    model = training.make_model()
    optimizer = hvd.LocalSGD(make_optimizer(model, QSPARSE), model.named_parameters(), compression=QSPARSE, every=4)
    sent = []
    for step in range(8):
        run(hvd, model, optimizer, range(step, step + 1))
        sent.append(optimizer.wire_bytes)
    assert [n > 0 for n in sent] == [False, False, False, True] * 2
    assert sent[3] < 4 * sum(p.numel() for p in model.parameters()) / 20


def case_momentum_and_batch_statistics_stay_local():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = hvd.LocalSGD(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), every=2)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        (model(x + hvd.rank()) - 1).square().mean().backward()
        optimizer.step()
    assert same_on_all_ranks(model)
    for own in (model[1].running_mean, optimizer.state[model[0].weight]["momentum_buffer"].reshape(-1)):
        everyone = hvd.allgather(own[None])
        assert not torch.equal(everyone[0], everyone[1])


def case_resume():
    for spec, options in (
        (LEARNING, {"every": 1}),
        (QSPARSE, {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}),
        ("topk(ratio=0.1) + cser(reset_period=4)", {}),
    ):
        straight, _ = train(hvd, spec, 10, **options)
        model, optimizer = train(hvd, spec, 4, **options)
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved)
        other = training.make_model()
        other.load_state_dict(loaded["model"])
        again = hvd.LocalSGD(make_optimizer(other, spec), other.named_parameters(), compression=spec, **options)
        again.load_state_dict(loaded["optimizer"])
        run(hvd, other, again, range(4, 10))
        assert_same(training.weights_of(other), training.weights_of(straight))
    plain = hvd.LocalSGD(make_optimizer(other, "none"), other.named_parameters(), every=7)
    raises(GraceError, "LocalSGD(every 7 steps)", lambda: plain.load_state_dict(loaded["optimizer"]))


def case_asynchronous_messages_are_applied_once():
    """Without compression, the model is the start less the sum of all drifts over R, although ranks have different schedules and speeds."""
    model = training.make_model()
    start, own = training.weights_of(model), {}
    optimizer = hvd.LocalSGD(make_optimizer(model, "none"), model.named_parameters(), every=2 + hvd.rank(), asynchronous=True)
    taken = optimizer._local.worker.messages.encode

    def remember(values):
        for name, x in optimizer._local.worker.model.master.items():
            own[name] = own.get(name, 0.0) + (x.astype(np.float64) - values[name].numpy().reshape(-1))
        return taken(values)

    optimizer._local.worker.messages.encode = remember
    for step in range(6 if hvd.rank() else 12):
        run(hvd, model, optimizer, range(step, step + 1))
        time.sleep(0.002)
    optimizer.sync()
    assert same_on_all_ranks(model)
    everyone = hvd.allgather_object(own)
    for name, w in training.weights_of(model).items():
        expected = start[name].reshape(-1) - sum(drifts[name] for drifts in everyone) / 2
        assert np.abs(w.reshape(-1) - expected).max() < 1e-5, name
        assert name == "unused" or np.abs(w - start[name]).max() > 1e-3, name


def case_asynchronous_and_compressed():
    model, optimizer = train(hvd, QSPARSE, 9 + 3 * hvd.rank(), every=2 + hvd.rank(), asynchronous=True)
    raises(GraceError, "call sync()", optimizer.state_dict)
    optimizer.sync()
    assert same_on_all_ranks(model)
    assert optimizer.state_dict()["grace_ext"]["model"]["step"] == 9 + 3 * hvd.rank()
    run(hvd, model, optimizer, range(20, 24))  # training can continue
    optimizer.sync()
    assert same_on_all_ranks(model)


def case_asynchronous_with_a_policy():
    """Ranks that have made different numbers of messages decode each other's by the sender's number."""
    for spec in (BY_NAME, f"every(n=3, then=none, otherwise={BY_NAME})"):
        model, optimizer = train(hvd, spec, 9 + 3 * hvd.rank(), every=2 + hvd.rank(), asynchronous=True)
        optimizer.sync()
        assert same_on_all_ranks(model)
        saved = optimizer.state_dict()["grace_ext"]
        again = hvd.LocalSGD(make_optimizer(model, spec), model.named_parameters(), spec, every=2 + hvd.rank(), asynchronous=True)
        again.load_state_dict({**optimizer.state_dict(), "grace_ext": saved})
        run(hvd, model, again, range(20, 26))
        again.sync()
        assert same_on_all_ranks(model)
    raises(IncompatiblePartsError, "policy 'accordion' learns", lambda: train(hvd, LEARNING, 1, asynchronous=True))


def case_nobody_waits_for_a_slow_rank():
    """Rank 1 sleeps in each of its 6 steps; asynchronously, rank 0 finishes 18 steps long before it; synchronously, it must wait."""
    ends = {}
    for asynchronous in (True, False):
        model = training.make_model()
        optimizer = hvd.LocalSGD(make_optimizer(model, QSPARSE), model.named_parameters(), QSPARSE, every=3, asynchronous=asynchronous)
        for step in range(18 if asynchronous and hvd.rank() == 0 else 6):
            time.sleep(0.4 * hvd.rank())
            run(hvd, model, optimizer, range(step, step + 1))
        ends[asynchronous] = hvd.allgather_object(time.time())
        optimizer.sync()
        assert same_on_all_ranks(model)
    assert ends[True][0] < ends[True][1] - 0.5, ends
    assert abs(ends[False][0] - ends[False][1]) < 0.3, ends


def case_a_rank_that_is_ahead_waits():
    model = training.make_model()
    optimizer = hvd.LocalSGD(make_optimizer(model, "none"), model.named_parameters(), every=1, asynchronous=True, max_ahead=2)
    ends = []
    for step in range(6):
        time.sleep(0.15 * hvd.rank())
        run(hvd, model, optimizer, range(step, step + 1))
        ends.append(time.time())
    optimizer.sync()
    fast, slow = hvd.allgather_object(ends)
    assert all(fast[step] > slow[step - 2] - 0.05 for step in range(3, 6)), (fast, slow)  # step 6 waits for step 4
    assert fast[1] < slow[1]


def case_a_rank_that_does_not_come_in_time():
    for asynchronous in (False, True):
        model, optimizer = train(hvd, "none", 1, every=4, timeout=1.0, asynchronous=asynchronous)
        begun = time.time()
        if hvd.rank() == 0:
            raises(RankLeftError, "rank 1 (last heard of at step", optimizer.sync)
            assert time.time() - begun < 5
        else:
            time.sleep(2.5)


def case_cser_ends_after_as_many_steps_on_all_ranks():
    """After 5 steps, one rank exchanges gradients and the other, in sync(), models: both get an error before any collective starts."""
    spec = "topk(ratio=0.1) + cser(reset_period=4)"
    model, optimizer = train(hvd, spec, 5, timeout=20.0)
    last = optimizer.sync if hvd.rank() else lambda: run(hvd, model, optimizer, range(5, 6))
    raises(RankLeftError, "some ranks exchange gradients and others models", last)


def case_cser_needs_plain_sgd():
    spec, model = "topk(ratio=0.1) + cser(reset_period=4)", training.make_model()
    for optimizer, has in (
        (torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01), "has weight_decay=0.01"),
        (torch.optim.ASGD(model.parameters(), lr=0.1), "has lambd="),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "has momentum=0.9"),
    ):
        raises(IncompatiblePartsError, has, lambda optimizer=optimizer: hvd.LocalSGD(optimizer, model.named_parameters(), spec))


def case_metrics_are_of_gradients():
    model, optimizer = train(hvd, QSPARSE, 1, every=3)
    raises(UnsupportedError, "has `wire_bytes`", lambda: hvd.MetricsHook(optimizer))


def case_parameters_that_train_later_are_refused():
    model = training.make_model()
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer = hvd.LocalSGD(make_optimizer(model, "none"), model.named_parameters(), "none", every=2)
    run(hvd, model, optimizer, range(3))
    frozen.requires_grad_(True)
    raises(UnsupportedError, "train now that did not", lambda: run(hvd, model, optimizer, range(3, 4)))
    raises(UnsupportedError, "wrap the optimizer again", optimizer.sync)
    frozen.requires_grad_(False)
    optimizer.sync()
    assert same_on_all_ranks(model)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    raises(UnsupportedError, "train now that did not", optimizer.sync)


def case_a_state_without_ours_starts_anew():
    """After loading a state without ours, training starts from the current weights, not from an older master copy."""
    model, optimizer = train(hvd, QSPARSE, 6, every=3)
    plain = {key: value for key, value in optimizer.state_dict().items() if key != "grace_ext"}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25)
    optimizer.load_state_dict(plain)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(hvd, model, optimizer, range(4))
    optimizer.sync()
    assert all((w == 0.25).all() for w in training.weights_of(model).values())
    assert optimizer.state_dict()["grace_ext"]["model"]["step"] == 4


def case_ranks_at_other_steps():
    def each(step):
        return step == 3 + hvd.rank()

    raises(RankLeftError, "[3, 4] by rank", lambda: train(hvd, "none", 4, schedule=each, max_gap=50))


def case_disagreement():
    raises(DisagreementError, "rank 1 uses 'LocalSGD(every 4 steps) of none", lambda: train(hvd, "none", 1, every=3 + hvd.rank()))
    model = training.make_model()
    model[0].weight.data += hvd.rank()
    optimizer = hvd.LocalSGD(make_optimizer(model, "none"), model.named_parameters(), every=2)
    raises(DisagreementError, "broadcast_parameters", lambda: run(hvd, model, optimizer, range(1)))
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # then it can start again
    run(hvd, model, optimizer, range(2))
    assert same_on_all_ranks(model)


def case_not_finite():
    model, optimizer = train(hvd, QSPARSE, 4, every=4)
    before, memory = training.weights_of(model), optimizer.state_dict()["grace_ext"]["models"]["state"]
    run(hvd, model, optimizer, range(4, 7))
    if hvd.rank() == 1:
        model[0].weight.data[0] = float("inf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(hvd, model, optimizer, range(7, 8))
    assert any("go back to the model of step 4" in str(w.message) for w in caught) == (hvd.rank() == 0)
    assert_same(training.weights_of(model), before)
    after = optimizer.state_dict()["grace_ext"]["models"]["state"]
    assert all(torch.equal(after[key], value) for key, value in memory.items())


def case_refusals():
    model = training.make_model()
    raises(NamesError, "lacks 1", lambda: hvd.LocalSGD(make_optimizer(model, "none"), list(model.named_parameters())[1:]))
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    raises(GraceError, "would not come together", lambda: hvd.LocalSGD(momentum, model.named_parameters(), "topk + cser"))


def case_process_set_and_one_rank():
    alone = hvd.add_process_set([1])
    model = training.make_model()
    optimizer = hvd.LocalSGD(make_optimizer(model, "none"), model.named_parameters(), every=2, process_set=alone, simulate=True)
    run(hvd, model, optimizer, range(5))
    optimizer.sync()
    twin = training.make_model()
    run(hvd, twin, make_optimizer(twin, "none"), range(5))
    assert_same(training.weights_of(model), training.weights_of(twin))  # R = 1 without loss is plain SGD
    hvd.remove_process_set(alone)


hvd.init()
assert hvd.size() == 2
run_cases(hvd, globals())
hvd.shutdown()
