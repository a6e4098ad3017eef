"""Cases of what ranks may and may not do differently with the wrapper. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import DisagreementError, GraceError, PayloadError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import raises, run_cases  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"
SPECS = (TOPK, "powersgd(rank=2) + residual", "randomk(ratio=0.1) + residual", "efsignsgd + residual @ reduce_scatter")


def wrapped(model, g=TOPK, **options):
    inner = torch.optim.SGD([p for p in model.parameters()], lr=0.05)
    return hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters(), compression=grace_ext.grace(g), **options)


def backward(model, step):
    training.loss_of(model, hvd.rank(), step).backward()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def frozen(layer, yes=True):
    for parameter in layer.parameters():
        parameter.requires_grad_(not yes)


def case_checked_every_step():
    for g in SPECS:
        model = training.make_model()
        optimizer = wrapped(model, g)
        hvd.check_agreement(optimizer)
        for step in range(3):
            train(model, optimizer, [step])
            hvd.check_agreement(optimizer)
            hvd.check_agreement(optimizer, model)


def case_one_bit_of_one_parameter():
    for g in SPECS:
        model = training.make_model()
        optimizer = wrapped(model, g)
        train(model, optimizer, range(2))
        if hvd.rank() == 1:
            with torch.no_grad():
                model[3].bias.view(torch.int32)[2] ^= 1
        text = f"rank 1: 1 of {len(list(model.parameters()))} parameters differ: 3.bias"
        raises(DisagreementError, text, lambda: hvd.check_agreement(optimizer))  # noqa: B023
        raises(DisagreementError, "rank 1: 1 of", lambda: hvd.check_agreement(optimizer, model))  # noqa: B023
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.check_agreement(optimizer)


def case_another_step():
    """If one rank is a step ahead, check_agreement finds it; a step itself may not, because randomk sends no header."""
    for g in SPECS:
        model = training.make_model()
        optimizer = wrapped(model, g)
        train(model, optimizer, range(2))
        optimizer._exchange.session.driver.step += hvd.rank() == 1
        raises(DisagreementError, "rank 1 is at step 3, rank 0 at step 2", lambda: hvd.check_agreement(optimizer))  # noqa: B023


def case_a_checkpoint_on_rank_0_alone():
    for g in SPECS:
        model = training.make_model()
        optimizer = wrapped(model, g)
        train(model, optimizer, range(2))
        saved = model.state_dict(), optimizer.state_dict()
        other = training.make_model()
        again = wrapped(other, g)
        if hvd.rank() == 0:
            other.load_state_dict(saved[0])
            again.load_state_dict(saved[1])
        raises(DisagreementError, "rank 1 is at step 0, rank 0 at step 2", lambda: train(other, again, [2]))  # noqa: B023
        again.zero_grad()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            hvd.broadcast_optimizer_state(again, 0)
        assert any("memory starts at zero" in str(w.message) for w in told) == (hvd.rank() != 0)
        hvd.broadcast_parameters(other.state_dict(), 0)
        train(other, again, range(2, 5))
        hvd.check_agreement(again)


def case_between_steps_only():
    model = training.make_model()
    optimizer = wrapped(model)
    for step in range(2):  # in the first step, gradients reach the driver only at its end
        optimizer.zero_grad()
        backward(model, step)
        raises(GraceError, "between steps", lambda: hvd.check_agreement(optimizer))
        optimizer.step()
    raises(UnsupportedError, "Linear", lambda: hvd.check_agreement(torch.nn.Linear(1, 1)))


def case_other_optimizers():
    """The check works for an uncompressed optimizer, too."""
    model = training.make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), None)
    train(model, optimizer, range(2))
    hvd.check_agreement(optimizer)
    if hvd.rank() == 1:
        model[0].weight.data[0] += 1
    raises(DisagreementError, "rank 1", lambda: hvd.check_agreement(optimizer, model))
    raises(DisagreementError, "rank 1", lambda: hvd.check_agreement(optimizer))


def case_unused_and_differing_graphs():
    """Ranks stay equal if rank 1 uses other layers, in another order, and no rank uses `unused`."""
    for g in SPECS:
        model = training.Shuffled()
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(5)))
        optimizer = wrapped(model, g)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(hvd.rank() % 2).backward()
            optimizer.step()
        hvd.check_agreement(optimizer)


def case_frozen_later_and_again_unfrozen():
    for g in SPECS:
        model = training.make_model()
        optimizer = wrapped(model, g)
        train(model, optimizer, range(2))
        frozen(model[0])
        train(model, optimizer, range(2, 4))
        frozen(model[0], False)
        before = model[0].weight.detach().clone()
        train(model, optimizer, range(4, 6))
        hvd.check_agreement(optimizer)
        assert not torch.equal(model[0].weight, before)


def case_frozen_at_first():
    """A layer that was frozen when the optimizer was wrapped has no hook: training it raises until the optimizer is wrapped again."""
    model = training.make_model()
    frozen(model[0])
    optimizer = wrapped(model)
    before = model[0].weight.detach().clone()
    train(model, optimizer, range(2))
    assert torch.equal(model[0].weight, before)
    frozen(model[0], False)
    raises(UnsupportedError, "wrap the optimizer again", lambda: train(model, optimizer, [2]))


def case_wrapped_again_after_unfreezing():
    model = training.make_model()
    frozen(model[0])
    train(model, wrapped(model), range(2))
    frozen(model[0], False)
    again = wrapped(model)
    train(model, again, range(2, 4))
    hvd.check_agreement(again)


def case_accumulated():
    model = training.make_model()
    optimizer = wrapped(model, backward_passes_per_step=2)
    for step in range(2):
        optimizer.zero_grad()
        backward(model, 2 * step)
        if hvd.rank() == 0 or step == 0:  # at the end, rank 1 has one batch fewer, and steps early
            backward(model, 2 * step + 1)
        optimizer.step()
    hvd.check_agreement(optimizer)


def case_sparse_on_all_ranks():
    for options in ({"sparse_as_dense": True}, {}):
        model = training.Bag(sparse=True)
        optimizer = wrapped(model, **options)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(hvd.rank(), step).backward()
            optimizer.step()
        hvd.check_agreement(optimizer)


def case_one_sparse_row():
    """Its element's stride is 0 or 4, and still it is contiguous."""
    torch.manual_seed(0)
    model = torch.nn.Embedding(4, 1, sparse=True)
    optimizer = wrapped(model)
    before = model.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([2])).sum().backward()
        optimizer.step()
    changed = model.weight.detach() != before
    assert changed.flatten().tolist() == [False, False, True, False]
    hvd.check_agreement(optimizer)


def case_learning_rates_that_differ():
    """Memory efsignsgd works in units of the update, so ranks must have one learning rate: told at the first step, and at later ones."""
    g = "topk(ratio=0.1) + efsignsgd"
    model = training.make_model()
    optimizer = wrapped(model, g)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + hvd.rank())
    raises(DisagreementError, "give all ranks one rate", lambda: train(model, optimizer, range(1)))
    model = training.make_model()
    optimizer = wrapped(model, g)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + hvd.rank())
    raises(PayloadError, "learning rate", lambda: train(model, optimizer, range(2, 3)))


def case_sparse_on_one_rank():
    """If a rank's first batch does not use the table, it cannot know that its gradient is sparse: raises, unless sparse_as_dense=True."""

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = model.loss(hvd.rank(), 0) if hvd.rank() == 0 else model.out(torch.ones(1, 4)).square().sum()
        loss.backward()
        optimizer.step()

    model = training.Bag(sparse=True)
    raises(DisagreementError, "table.weight", lambda: step(model, wrapped(model)))
    dense = wrapped(model, sparse_as_dense=True)
    step(model, dense)
    hvd.check_agreement(dense)


def case_uneven_batches():
    """Rank 1 runs out of data first, and makes a step without gradients, in which its residual is still sent."""
    for g in SPECS:
        model = training.make_model()
        optimizer = wrapped(model, g)
        for step in range(4):
            optimizer.zero_grad()
            if step < 4 - hvd.rank():
                backward(model, step)
            optimizer.step()
        hvd.check_agreement(optimizer)


def case_join():
    """Rank 1 runs out of data first and waits in Horovod's join(), which cannot take part in gathers; the others get an error."""
    if hvd.join.__module__.startswith("grace_ext"):  # torch.distributed has no join
        return raises(UnsupportedError, "hvd.join()", hvd.join)
    model = training.make_model()
    optimizer = wrapped(model)
    train(model, optimizer, range(2))
    if hvd.rank() != 1:
        raises(PayloadError, "in hvd.join(): let it call step() without gradients", lambda: train(model, optimizer, [2]))
    hvd.join()


hvd.init()
run_cases(hvd, globals())
hvd.shutdown()
