"""Cases of other people's training scripts on 2 ranks, under any launcher. Prints 'CASE name ok' for each case that holds on all ranks."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import partial
from pathlib import Path

import torch

import grace_ext.frameworks.torch as hvd
from grace_ext.errors import DisagreementError, GraceError, PayloadError, UnsupportedDtypeError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import assert_same, raises, run_cases, warnings_of  # noqa: E402

TOPK = "topk(ratio=0.1) + residual"


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, **options})


def wrap(model, g=TOPK, make=sgd, **options):
    return hvd.DistributedOptimizer(make(model), model.named_parameters(), compression=g, **options)


def both_ranks(steps, make=sgd, change=lambda model: None, twin=None, loss=training.loss_of):
    """Trains on the mean gradient of both ranks' losses, in one process. change: what is done to the gradients before each step."""
    twin = twin or training.make_model()
    optimizer = make(twin)
    for step in steps:
        optimizer.zero_grad()
        (sum(loss(twin, rank, step) for rank in range(2)) / 2).backward()
        change(twin)
        optimizer.step()
    return training.weights_of(twin)


def assert_close(one, other, tolerance=1e-6):
    for name in other:
        assert abs(one[name] - other[name]).max(initial=0) <= tolerance, (name, abs(one[name] - other[name]).max())


def closure_of(optimizer, model, step):
    """Returns a closure that computes this rank's loss and gradients of that step."""

    def closure():
        optimizer.zero_grad()
        loss = training.loss_of(model, hvd.rank(), step)
        loss.backward()
        return loss

    return closure


# --- closures ---------------------------------------------------------------------------------------------------------
def case_step_with_a_closure_exchanges_its_gradients():
    model = training.make_model()
    optimizer = wrap(model, "none")
    for step in range(3):
        loss = training.loss_of(model, hvd.rank(), step).item()
        assert optimizer.step(closure_of(optimizer, model, step)).item() == loss
    assert_close(training.weights_of(model), both_ranks(range(3)))


def case_lbfgs_decides_alike():
    """LBFGS evaluates its closure as often as the losses say: ranks with losses of their own would make different numbers of exchanges."""
    for options in ({}, {"line_search_fn": "strong_wolfe"}):
        make = lambda m, options=options: torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=7, **options)  # noqa: E731
        model, calls = training.make_model(), []
        optimizer = wrap(model, "none", make=make)

        def closure(model=model, optimizer=optimizer, calls=calls):
            calls.append(1)
            optimizer.zero_grad()
            loss = training.loss_of(model, hvd.rank(), 0)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        twin = training.make_model()
        theirs = make(twin)

        def both(twin=twin, theirs=theirs):
            theirs.zero_grad()
            loss = sum(training.loss_of(twin, rank, 0) for rank in range(2)) / 2
            loss.backward()
            return loss

        for _ in range(2):
            theirs.step(both)
        assert len(set(hvd.allgather_object(len(calls)))) == 1
        assert_close(training.weights_of(model), training.weights_of(twin), 1e-4)


def case_closures_that_cannot_be_right():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    model = training.make_model()
    optimizer = wrap(model, make=lambda m: Deaf(m.parameters(), lr=0.05))
    raises(GraceError, "ignores its closure", lambda: optimizer.step(lambda: None))
    model = training.make_model()
    optimizer = wrap(model)

    def closure():
        training.loss_of(model, hvd.rank(), 0).backward()

    with optimizer.skip_synchronize():
        raises(AssertionError, "skip_synchronize", lambda: optimizer.step(closure))
    optimizer.discard()


def case_local_sgd_with_a_closure():
    model = training.make_model()
    optimizer = hvd.LocalSGD(sgd(model), model.named_parameters(), compression="topk(ratio=0.1) + cser(reset_period=2)")
    other = training.make_model()
    by_hand = hvd.LocalSGD(sgd(other), other.named_parameters(), compression="topk(ratio=0.1) + cser(reset_period=2)")
    for step in range(4):
        optimizer.step(closure_of(optimizer, model, step))
        by_hand.zero_grad()
        training.loss_of(other, hvd.rank(), step).backward()
        by_hand.step()
    assert_same(training.weights_of(model), training.weights_of(other))


# --- schedulers, trainers ---------------------------------------------------------------------------------------------
def case_a_scheduler_of_the_plain_optimizer_stays_connected():
    for wrapped_by in (lambda m, o: hvd.DistributedOptimizer(o, m.named_parameters(), compression=TOPK),
                       lambda m, o: hvd.LocalSGD(o, m.named_parameters(), compression=TOPK)):  # fmt: skip
        model = training.make_model()
        plain = sgd(model, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
        optimizer = wrapped_by(model, plain)

        def steps(count, model=model, optimizer=optimizer, scheduler=scheduler):
            for step in range(count):
                optimizer.zero_grad()
                training.loss_of(model, hvd.rank(), step).backward()
                optimizer.step()
                scheduler.step()

        assert not warnings_of(lambda steps=steps: steps(2)), "a spurious warning of the scheduler"
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        steps(1)
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.05 * 0.5**3
        assert optimizer.state is plain.state and len(plain.state) > 0
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        steps(1)
        rates = hvd.allgather_object((optimizer.param_groups[0]["lr"], plain.param_groups[0]["lr"], scheduler.get_last_lr()[0]))
        assert rates == [(0.05 * 0.5**4,) * 3] * 2, rates
        plain.load_state_dict({key: value for key, value in copy.deepcopy(optimizer.state_dict()).items() if key != "grace_ext"})
        steps(1)
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.05 * 0.5**5


def case_options_of_the_wrapped_step():
    class Scaled(torch.optim.SGD):
        def step(self, closure=None, *, scale=1.0):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(scale)
            return super().step(closure)

    model = training.make_model()
    optimizer = wrap(model, "none", make=lambda m: Scaled(m.parameters(), lr=0.05))
    training.loss_of(model, hvd.rank(), 0).backward()
    optimizer.step(scale=0.5)
    assert_close(training.weights_of(model), both_ranks(range(1), make=lambda m: torch.optim.SGD(m.parameters(), lr=0.025)))


def case_a_copy_of_the_attributes_shares_the_exchange():
    """Lightning's manual optimization copies an optimizer's attributes into an object of its own class; both then share the exchange."""
    model = training.make_model()
    optimizer = wrap(model, "none")

    class Proxy:
        def __init__(self, real):
            self.__class__ = type("Proxy", (Proxy, type(real)), {})
            self.__dict__.update(real.__dict__)
            self._real = real

        def step(self, closure=None):
            return self._real.step(closure)

    proxy = Proxy(optimizer)
    for step in range(3):
        proxy.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        if step == 1:
            proxy.synchronize()
            with proxy.skip_synchronize():
                proxy.step()
        else:
            proxy.step()
    assert_close(training.weights_of(model), both_ranks(range(3)))


def case_a_compiled_step():
    model = training.make_model()
    optimizer = wrap(model, "none")
    step_once = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(3):
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        step_once()
    assert_close(training.weights_of(model), both_ranks(range(3)))


def case_copies_are_refused():
    model = training.make_model()
    for optimizer in (wrap(model), hvd.LocalSGD(sgd(model), model.named_parameters(), compression=TOPK)):
        raises(UnsupportedError, "cannot be copied", lambda o=optimizer: copy.deepcopy(o))
        raises(UnsupportedError, "cannot be copied", lambda o=optimizer: pickle.dumps(o))


def case_compiled_models_have_the_same_names():
    model = training.make_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = hvd.DistributedOptimizer(sgd(compiled), compiled.named_parameters(), compression=TOPK)
    training.loss_of(compiled, hvd.rank(), 0).backward()
    optimizer.step()
    names = {key.partition("/")[2] for key in optimizer.state_dict()["grace_ext"]["state"]}
    assert names == {name for name, _ in model.named_parameters()}, names


# --- gradients of every kind ------------------------------------------------------------------------------------------
def case_one_tensor_as_the_gradient_of_two_parameters():
    results = []
    for share in (True, False):
        parameters = {name: torch.nn.Parameter(torch.ones(40)) for name in "ab"}
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters.values(), lr=1.0), parameters.items(), compression=TOPK)
        for _ in range(2):
            optimizer.zero_grad()
            mine = (torch.arange(40.0) + 1) * (1 + hvd.rank())
            parameters["a"].grad, parameters["b"].grad = mine, mine if share else mine.clone()
            optimizer.step()
        results.append({name: p.detach().numpy() for name, p in parameters.items()})
    assert_same(*results)


def case_gradients_in_any_memory():
    """Strided, expanded, channels-last gradients, and views of one buffer, give what contiguous ones give."""
    shapes = {"strided": (30,), "expanded": (30,), "matrix": (6, 5), "last": (2, 3, 4, 4), "one": (12,), "two": (18,)}

    def gradients(rank):
        x = {n: torch.randn(s, generator=torch.Generator().manual_seed(7 + rank)) for n, s in shapes.items()}
        x["expanded"] = torch.full((30,), 0.5 + rank)
        return x

    def odd(x):
        buffer = torch.cat([x["one"], x["two"]])
        return {
            "strided": torch.complex(x["strided"], torch.ones(30)).real,
            "expanded": torch.tensor(float(x["expanded"][0])).expand(30),
            "matrix": x["matrix"].t().contiguous().t(),
            "last": x["last"].to(memory_format=torch.channels_last),
            "one": buffer[:12],
            "two": buffer[12:],
        }

    def trained(kind, g, overlap):
        parameters = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters.values(), lr=1.0), parameters.items(), compression=g, overlap=overlap
        )
        for _ in range(3):
            optimizer.zero_grad()
            for name, gradient in kind(gradients(hvd.rank())).items():
                parameters[name].grad = gradient
            optimizer.step()
        return {name: p.detach().numpy().copy() for name, p in parameters.items()}

    for g in ("none", TOPK, "efsignsgd + residual", "powersgd(rank=2) + residual"):
        for overlap in (True, False):
            assert_same(trained(odd, g, overlap), trained(lambda x: x, g, overlap))


def case_complex_parameters_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    raises(UnsupportedDtypeError, "view_as_complex", lambda: hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0), [("w", parameter)], compression=TOPK))  # fmt: skip


# --- gradients that shall not count, and changed gradients ------------------------------------------------------------
def train(model, optimizer, steps, between=lambda step: None):
    for step in steps:
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        between(step)
        optimizer.step()
    return training.weights_of(model)


SPECS = ("none", TOPK, "efsignsgd + residual", "powersgd(rank=2) + powersgd", "topk(ratio=0.1) + ef21", "qsgd(bits=4)",
         "threshold(threshold=0.01) + residual", "topk(ratio=0.1) + dgc", "by_size(large=topk(ratio=0.1) + residual, min_elements=100)",
         "topk(ratio=0.1) + residual @ sparse_allreduce", "efsignsgd + residual @ reduce_scatter")  # fmt: skip


def case_discarded_gradients_do_not_count():
    for g in SPECS:
        for overlap in (True, False):
            expected = train(model := training.make_model(), wrap(model, g), range(4))
            optimizer = wrap(model := training.make_model(), g, overlap=overlap)
            train(model, optimizer, range(2))
            for extra in (50, 51):  # a spike, then a batch of which this rank has computed nothing
                if extra == 50 or hvd.rank() == 0:
                    training.loss_of(model, hvd.rank(), extra).backward()
                optimizer.discard()
            assert all(p.grad is None for p in model.parameters())
            assert_same(train(model, optimizer, range(2, 4)), expected)


def case_discarded_before_the_first_step():
    expected = train(model := training.make_model(), wrap(model), range(3))
    optimizer = wrap(model := training.make_model())
    training.loss_of(model, hvd.rank(), 50).backward()
    optimizer.discard()
    assert_same(train(model, optimizer, range(3)), expected)


def case_undone_exchanges_do_not_count():
    for g in SPECS:
        expected = train(model := training.make_model(), wrap(model, g), range(4))
        optimizer = wrap(model := training.make_model(), g)
        train(model, optimizer, range(2))
        training.loss_of(model, hvd.rank(), 50).backward()
        optimizer.synchronize()
        optimizer.undo()
        assert_same(train(model, optimizer, range(2, 4)), expected)
    raises(AssertionError, "discard", optimizer.undo)


def case_a_discard_on_one_rank_is_told_to_all():
    for g in (TOPK, "none", "powersgd(rank=2) + residual", "fp16"):
        model = training.make_model()
        optimizer = wrap(model, g)
        train(model, optimizer, range(2))
        training.loss_of(model, hvd.rank(), 2).backward()
        if hvd.rank() == 0:
            optimizer.step()
        else:
            optimizer.discard()
        optimizer.zero_grad()
        raises(PayloadError, "discard() or undo()", lambda m=model, o=optimizer: train(m, o, range(3, 4)))


def case_zero_grad_names_the_ways_out():
    model = training.make_model()
    optimizer = wrap(model)
    training.loss_of(model, hvd.rank(), 0).backward()
    raises(AssertionError, "optimizer.discard()", optimizer.zero_grad)
    optimizer.discard()


def case_without_overlap_gradients_may_be_cleared_and_changed():
    def clip(model):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    model = training.make_model()
    optimizer = wrap(model, "none", overlap=False)
    training.loss_of(model, hvd.rank(), 50).backward()
    optimizer.zero_grad()  # of a GAN's other loss, say
    for step in range(3):
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        clip(model)
        model[0].weight.grad = None
        optimizer.step()
    twin = training.make_model()
    theirs = sgd(twin)
    for step in range(3):
        means = [torch.zeros_like(p) for p in twin.parameters()]
        for rank in range(2):
            twin.zero_grad()
            training.loss_of(twin, rank, step).backward()
            clip(twin)
            twin[0].weight.grad = None
            for mean, p in zip(means, twin.parameters(), strict=True):
                if p.grad is not None:
                    mean += p.grad / 2
        for mean, p in zip(means, twin.parameters(), strict=True):
            p.grad = mean
        theirs.step()
    assert_close(training.weights_of(model), training.weights_of(twin))


def case_clip_before_and_after():
    def clip(norm):
        return lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), norm)

    assert_close(
        train(model := training.make_model(), wrap(model, "none", clip_after=0.1), range(3)), both_ranks(range(3), change=clip(0.1))
    )
    by_hand = wrap(model := training.make_model(), TOPK, overlap=False)
    expected = train(model, by_hand, range(3), between=lambda step, model=model: clip(0.1)(model))
    assert_same(train(model := training.make_model(), wrap(model, TOPK, clip_before=0.1), range(3)), expected)
    raises(ValueError, "above 0", lambda: wrap(training.make_model(), clip_after=0.0))


def case_changed_gradients_are_an_error():
    """From the first step on, and with every way to change them. All ranks get the error: of their own change, or of the other's."""
    changes = (
        lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1),
        lambda m: setattr(m[0].weight, "grad", None),
        lambda m: m[0].weight.grad.zero_(),
        lambda m: setattr(m[0].bias, "grad", m[0].bias.grad * 2),
    )
    for change in changes:
        for at in (0, 2):
            optimizer = wrap(model := training.make_model())
            train(model, optimizer, range(at))
            changed = partial(train, model, optimizer, range(at, at + 1), lambda step, change=change, model=model: change(model))
            raises(UnsupportedError, "optimizer.synchronize()", changed)
    optimizer = wrap(model := training.make_model())
    train(model, optimizer, range(2))
    one_rank = lambda step: model[0].weight.grad.zero_() if hvd.rank() == 0 else None  # noqa: E731
    if hvd.rank() == 0:
        raises(UnsupportedError, "optimizer.synchronize()", lambda: train(model, optimizer, range(2, 3), one_rank))
    else:
        train(model, optimizer, range(2, 3), one_rank)
    raises(PayloadError, "discard() or undo()", lambda: (optimizer.discard(), train(model, optimizer, range(3, 4))))


# --- steps and layers that are told about -----------------------------------------------------------------------------
def case_a_step_without_a_backward_is_told_once():
    model = training.make_model()
    optimizer = wrap(model)
    train(model, optimizer, range(1))
    told = warnings_of(lambda: (optimizer.step(), optimizer.step()))
    assert len(told) == 1 and "no gradient was computed" in str(told[0].message) and told[0].filename == __file__, told


def case_a_layer_that_was_replaced_is_told_once():
    model = training.make_model()
    optimizer = wrap(model)
    train(model, optimizer, range(1))
    model[5] = torch.nn.Linear(16, 3)
    told = warnings_of(lambda: train(model, optimizer, range(1, 8)))
    assert len(told) == 1 and "5.weight, 5.bias" in str(told[0].message), [str(w.message) for w in told]


def case_layers_taken_over_by_a_second_wrapper():
    model = training.make_model()
    first = wrap(model)
    train(model, first, range(1))
    second = wrap(model)
    training.loss_of(model, hvd.rank(), 1).backward()
    second.step()
    raises(GraceError, "taken over", first.step)


# --- collectives beside ours ------------------------------------------------------------------------------------------
def case_other_collectives_between_backward_and_step():
    """A metric, a barrier and a second model that one rank leaves out do not come between the collectives of an exchange."""
    expected = train(model := training.make_model(), wrap(model), range(4))

    def metric(step):
        mean = hvd.allreduce(torch.tensor([float(hvd.rank())]), name=f"metric/{step}")
        assert mean.item() == 0.5
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.ones(3))
            torch.distributed.barrier()

    assert_same(train(model := training.make_model(), wrap(model), range(4), metric), expected)


def case_an_unused_head_on_one_rank():
    """Rank 1 lacks a gradient, so its last bucket starts in step() and not in backward(); a metric comes before that."""

    def trained(metric):
        torch.manual_seed(5)
        model = torch.nn.ModuleList([torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)])
        optimizer = wrap(model)
        optimizer._exchange.session.driver.bucket_bytes = 3000
        for step in range(4):
            optimizer.zero_grad()
            x = model[0](torch.full((2, 50), 0.1 * (1 + step + hvd.rank())))
            (model[1](x) if hvd.rank() == 0 else x).square().sum().backward()
            if metric and torch.distributed.is_initialized():
                torch.distributed.all_reduce(torch.ones(3))
            optimizer.step()
        return training.weights_of(model)

    assert_same(trained(True), trained(False))


def case_steps_of_two_wrappers_in_another_order():
    """If all parameters have gradients, so that nothing is left to start in step(), ranks may step their optimizers in different orders."""

    def make_model():
        model = training.make_model()
        model.unused.requires_grad_(False)
        return model

    expected = train(model := make_model(), wrap(model), range(3))
    models = [make_model(), make_model()]
    optimizers = [wrap(model) for model in models]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            training.loss_of(model, hvd.rank(), step).backward()
        order = optimizers if step == 0 or hvd.rank() == 0 else optimizers[::-1]
        for optimizer in order:
            optimizer.step()
    for model in models:
        assert_same(training.weights_of(model), expected)


# --- the same start ---------------------------------------------------------------------------------------------------
def case_ranks_that_start_differently_are_told():
    def differing(**options):
        model = training.make_model()
        with torch.no_grad():
            model[3].bias += hvd.rank()
        return model, wrap(model, **options)

    for g in (TOPK, "none", "powersgd(rank=2) + residual"):
        model, optimizer = differing(g=g)
        raises(DisagreementError, "broadcast_parameters", lambda m=model, o=optimizer: train(m, o, range(1)))
    try:
        train(*differing(), range(1))
    except DisagreementError as error:
        assert "3.bias" in str(error) and "1 of 7 parameters differ" in str(error), error
    train(*differing(check_start=False), range(2))
    model, optimizer = differing()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    train(model, optimizer, range(2))


if __name__ == "__main__":
    hvd.init()
    run_cases(hvd, globals())
