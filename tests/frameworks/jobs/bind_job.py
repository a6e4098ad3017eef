"""Cases of `g.bind(...)` with unmodified horovod.torch on 2 ranks. Results are compared with those of the wrapper."""

from __future__ import annotations

import sys
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as wrapper
from grace_ext.errors import DisagreementError, NamesError, UnboundError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import assert_same, raises, run_cases  # noqa: E402

G = grace_ext.grace("topk(ratio=0.1) + residual")


def plain(model, bind_options=None, make=training.make_optimizer, **options):
    bound = G.bind(model.named_parameters(), **(bind_options or {}))
    return hvd.DistributedOptimizer(make(model), named_parameters=model.named_parameters(), compression=bound, **options)


def wrapped(model, make=training.make_optimizer, **options):
    return wrapper.DistributedOptimizer(make(model), named_parameters=model.named_parameters(), compression=G, **options)


def train(model, optimizer, steps=range(4), passes=1):
    for step in steps:
        optimizer.zero_grad()
        for i in range(passes):
            training.loss_of(model, hvd.rank(), passes * step + i).backward()
        optimizer.step()
    return training.weights_of(model)


def both_ways(passes=1, bind_options=None, **options):
    one, other = training.make_model(), training.make_model()
    got = train(one, plain(one, bind_options, **options), passes=passes)
    assert_same(got, train(other, wrapped(other, **options), passes=passes))


def case_average():
    both_ways()


def case_metrics():
    model = training.make_model()
    optimizer = plain(model)
    bound = optimizer._compression
    wrapper.MetricsHook(bound, every=2)
    got = train(model, optimizer)
    other = training.make_model()
    assert_same(got, train(other, wrapped(other)))
    report = bound.metrics()
    assert report["step"] == 3 and report["measured_at"] == 2 and report["total"]["bytes"] == bound.wire_bytes > 0
    assert 0 < report["total"]["relative_error"] < 1


def case_sum():
    both_ways(bind_options={"op": hvd.Sum}, op=hvd.Sum)


def case_backward_passes():
    both_ways(passes=2, backward_passes_per_step=2)


def case_groups():
    both_ways(groups=2)


def case_predivide():
    both_ways(gradient_predivide_factor=2.0)


def case_sparse_as_dense():
    weights = []
    for make_optimizer in (plain, wrapped):
        model = training.Bag(sparse=True)
        optimizer = make_optimizer(model, make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1), sparse_as_dense=True)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(hvd.rank(), step).backward()
            optimizer.step()
        weights.append(training.weights_of(model))
    for name in weights[1]:
        assert np.allclose(weights[0][name], weights[1][name], atol=1e-6), name


def case_sparse_stays_exact():
    model = training.Bag(sparse=True)
    optimizer = plain(model, make=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        model.loss(hvd.rank(), step).backward()
        optimizer.step()
    everyone = hvd.allgather(model.table.weight.detach()[None])
    assert torch.equal(everyone[0], everyone[1])


def case_graphs_in_another_order():
    model = training.Shuffled()
    optimizer = plain(model)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(hvd.rank()).backward()
        optimizer.step()
    mine = torch.from_numpy(np.concatenate([w.reshape(-1) for w in training.weights_of(model).values()]))
    everyone = hvd.allgather(mine[None])
    assert torch.equal(everyone[0], everyone[1])


def case_resume():
    straight = training.make_model()
    expected = train(straight, plain(straight), range(5))
    model = training.make_model()
    bound = G.bind(model.named_parameters())
    optimizer = hvd.DistributedOptimizer(training.make_optimizer(model), model.named_parameters(), compression=bound)
    train(model, optimizer, range(3))
    other = training.make_model()
    other.load_state_dict(model.state_dict())
    again = G.bind(other.named_parameters())
    again.load_state_dict(bound.state_dict())
    resumed = hvd.DistributedOptimizer(training.make_optimizer(other), other.named_parameters(), compression=again)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same(train(other, resumed, range(3, 5)), expected)


def case_unbound_is_refused():
    model = training.make_model()
    optimizer = hvd.DistributedOptimizer(training.make_optimizer(model), model.named_parameters(), compression=G)
    raises(UnboundError, "grace_ext.frameworks.torch", lambda: training.loss_of(model, hvd.rank(), 0).backward())
    del optimizer


def case_bind_refuses():
    model = training.make_model()
    raises(UnsupportedError, "Adasum", lambda: G.bind(model.named_parameters(), op=hvd.Adasum))
    raises(NamesError, "more than once", lambda: G.bind([*model.named_parameters(), *model.named_parameters()]))
    raises(UnboundError, "no parameters", lambda: G.bind([]))
    raises(UnboundError, "optimizer=", lambda: G.bind(model.named_parameters(), simulate=True))


def case_disagreement():  # the last case, because it leaves Horovod's own part of the step unfinished
    model = training.make_model()
    g = grace_ext.grace(["topk + residual", "qsgd(bits=4)"][hvd.rank()])
    optimizer = hvd.DistributedOptimizer(
        training.make_optimizer(model), model.named_parameters(), compression=g.bind(model.named_parameters())
    )
    training.loss_of(model, hvd.rank(), 0).backward()
    raises(DisagreementError, "rank 1 uses 'qsgd(bits=4) @ allgather'", optimizer.step)


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
