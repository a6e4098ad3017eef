"""Cases of privacy in the torch wrapper, under any launcher and on any number of ranks. Prints 'CASE name ok' for each case."""

from __future__ import annotations

import copy
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import GraceError, ParameterError, SpecSyntaxError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402
from cases import raises, run_cases  # noqa: E402
from privacy import check_nothing_raw_is_sent, same_noise, tapped  # noqa: E402

CLIP, BATCH = 0.5, 16
RANKS = hvd.Privacy(clip=CLIP, noise_multiplier=0)
EXAMPLES = hvd.Privacy(clip=CLIP, noise_multiplier=0, unit="example", sample_rate=0.1, batch=BATCH)
NOISY = hvd.Privacy(clip=1, noise_multiplier=2, unit="example", sample_rate=0.1, batch=BATCH)


def sgd(model, lr=1.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def wrap(model, privacy=None, g="none", **options):
    return hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters(), compression=g, privacy=privacy, **options)


def data(rank, step=0, count=8):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets)


def norm(tensors):
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors.values()))


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def one_by_one(rank, step=0):
    """Returns the gradients of each example of this rank, each by a backward pass of its own."""
    model, found = training.make_model(), []
    for x, y in zip(*data(rank, step), strict=True):
        model.zero_grad()
        loss(model(x[None]), y[None]).backward()
        found.append(gradients(model))
    return found


def clipped(found):
    factor = min(1.0, CLIP / norm(found))
    return {name: factor * x for name, x in found.items()}


def assert_close(model, expected, atol=1e-6):
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), expected[name].numpy(), rtol=1e-4, atol=atol, err_msg=name)


def case_a_rank_is_clipped_as_a_whole():
    model = training.make_model()
    optimizer, expected = wrap(model, RANKS), []
    for rank in range(hvd.size()):
        twin = training.make_model()
        (30 * training.loss_of(twin, rank, 0)).backward()
        expected.append(clipped(gradients(twin)))
    (30 * training.loss_of(model, hvd.rank(), 0)).backward()
    optimizer.step()
    assert_close(model, {name: sum(x[name] for x in expected) / hvd.size() for name in expected[0]})


def case_it_equals_a_local_cluster_bit_for_bit():
    """Without noise, with memory and compression, by argument and by prefix."""
    spec = "topk(ratio=0.1) + residual"
    for options in ({"privacy": RANKS, "g": spec}, {"g": f"gaussian(clip={CLIP}, noise_multiplier=0) | {spec}"}):
        model, cluster = training.make_model(), grace_ext.LocalCluster(spec, hvd.size(), "torch", privacy=RANKS)
        optimizer = wrap(model, simulate=True, **options)
        for step in range(3):
            raw = []
            for rank in range(hvd.size()):
                twin = copy.deepcopy(model)
                twin.zero_grad()
                training.loss_of(twin, rank, step).backward()
                raw.append(gradients(twin))
            optimizer.zero_grad()
            training.loss_of(model, hvd.rank(), step).backward()
            optimizer.step()
            for name, mean in cluster.step(raw).items():
                assert mean.numpy().tobytes() == dict(model.named_parameters())[name].grad.numpy().tobytes(), name


def case_examples_are_clipped_one_by_one():
    """Sums of clipped gradients, divided by the expected batch, from torch.func, and from per-example gradients made elsewhere."""
    expected = [[clipped(x) for x in one_by_one(rank)] for rank in range(hvd.size())]
    means = {name: sum(x[name] for own in expected for x in own) / BATCH / hvd.size() for name in expected[0][0]}
    model = training.make_model()
    optimizer = wrap(model, EXAMPLES)
    losses = hvd.per_example_backward(model, loss, *data(hvd.rank()))
    optimizer.step()
    assert len(losses) == 8 and all(p.grad_sample is None for p in model.parameters())
    assert_close(model, means)

    model = training.make_model()
    optimizer = wrap(model, EXAMPLES)
    loss(model(data(hvd.rank())[0]), data(hvd.rank())[1]).backward()  # as with Opacus, which leaves both
    samples = one_by_one(hvd.rank())
    for name, p in model.named_parameters():
        p.grad_sample = torch.stack([x[name] for x in samples])
    optimizer.step()
    assert_close(model, means)


def case_an_example_of_a_million_or_nan_changes_the_sum_by_two_clips_at_most():
    outcomes = []
    for factor in (1.0, 1e6, math.nan, 0.0):
        model = training.make_model()
        optimizer = wrap(model, EXAMPLES)
        hvd.per_example_backward(model, loss, *data(hvd.rank()))
        if hvd.rank() == 0:
            for p in model.parameters():
                p.grad_sample = p.grad_sample[0].clone()  # torch gives zeros as one row that all examples share
                p.grad_sample[3] *= factor
        optimizer.step()
        outcomes.append({name: x * BATCH * hvd.size() for name, x in gradients(model).items()})
    plain, million, nan, removed = outcomes
    for other in outcomes:
        assert norm({name: plain[name] - x for name, x in other.items()}) <= 2 * CLIP * (1 + 1e-4)
        assert norm({name: removed[name] - x for name, x in other.items()}) <= CLIP * (1 + 1e-4)
    assert norm(million) > 0 and norm({name: removed[name] - x for name, x in nan.items()}) < 1e-5


def case_an_empty_batch_sends_noise():
    """Every parameter gets noise of the full size, also at steps at which no rank has an example, and nothing warns."""
    model = torch.nn.Linear(100, 100)
    optimizer = wrap(model, NOISY)
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.zeros(0, 100)
        assert len(hvd.per_example_backward(model, lambda out, y: out.sum(), x, x)) == 0
        optimizer.step()
        expected = 2 / BATCH / math.sqrt(hvd.size())
        assert abs(float(model.weight.grad.std()) / expected - 1) < 0.05 and bool(model.bias.grad.all())
    assert math.isclose(optimizer.epsilon(1e-5), NOISY.epsilon(1e-5, 2))


def case_several_passes_make_one_batch_with_one_draw():
    """Two calls before a step are one release; the sum is that of both, the noise that of one."""
    for privacy in (EXAMPLES, NOISY):
        model = training.make_model()
        optimizer = wrap(model, privacy)
        x, y = data(hvd.rank())
        hvd.per_example_backward(model, loss, x[:5], y[:5])
        hvd.per_example_backward(model, loss, x[5:], y[5:])
        optimizer.step()
        if privacy is EXAMPLES:
            expected = [[clipped(g) for g in one_by_one(rank)] for rank in range(hvd.size())]
            assert_close(model, {n: sum(g[n] for own in expected for g in own) / BATCH / hvd.size() for n in expected[0][0]})
        else:
            assert optimizer._exchange.session.driver.mechanism.releases == 1
            assert float(model[3].weight.grad.std()) < 1.3 * 2 / BATCH / math.sqrt(hvd.size())


def case_nothing_starts_in_the_backward_pass():
    """Also from the second step on, when exchanges without privacy start in hooks."""
    model = training.make_model()
    optimizer = wrap(model, RANKS)
    for step in range(3):
        optimizer.zero_grad()
        training.loss_of(model, hvd.rank(), step).backward()
        assert not optimizer._exchange.session.driver.under_way
        optimizer.step()


def case_the_transport_sees_private_gradients_only():
    """Two runs whose raw gradients differ by a factor of 1024, and
    whose clipped ones do not, give the same bytes, as the noise is equal."""
    seen = {}
    with same_noise(hvd.rank()):
        for private in (True, False):
            for scale in (1.0, 1024.0):
                model, g = training.make_model(), "topk(ratio=0.1) + residual"
                optimizer = wrap(model, hvd.Privacy(clip=1e-3) if private else None, g, simulate=True, check_start=False)
                optimizer.param_groups[0]["lr"] = 0.0
                seen[private, scale] = tapped(optimizer._exchange.session.driver.transport)
                for step in range(3):
                    optimizer.zero_grad()
                    (scale * training.loss_of(model, hvd.rank(), step)).backward()
                    optimizer.step()  # with rate 0: the weights stay, so that the raw gradients keep their factor
    check_nothing_raw_is_sent(seen)


def case_ranks_draw_noise_of_their_own():
    model = torch.nn.Linear(50, 50)
    optimizer = wrap(model, hvd.Privacy(clip=1, noise_multiplier=1))
    made = []
    driver = optimizer._exchange.session.driver
    privatize = driver.privatize

    def recorded(*args):
        private = privatize(*args)
        made.append({name: x.clone() for name, x in private.items()})  # the aggregate will be written over it
        return private

    driver.privatize = recorded
    torch.manual_seed(0)
    np.random.seed(0)
    optimizer.step()
    everyones = hvd.allgather_object([x.flatten().tolist()[:100] for x in made[0].values()])
    values = [v for own in everyones for flat in own for v in flat]
    assert len(set(values)) == len(values)


def case_a_checkpoint_has_the_count_and_no_noise():
    model = training.make_model()
    optimizer = wrap(model, NOISY, "topk(ratio=0.1) + residual")
    for _ in range(3):
        hvd.per_example_backward(model, loss, *data(hvd.rank()))
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    outcomes = []
    for _ in range(2):
        again = copy.deepcopy(model)
        resumed = wrap(again, NOISY, "topk(ratio=0.1) + residual")
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert math.isclose(resumed.epsilon(1e-5), NOISY.epsilon(1e-5, 3))
        hvd.per_example_backward(again, loss, *data(hvd.rank()))
        resumed.step()
        assert math.isclose(resumed.epsilon(1e-5), NOISY.epsilon(1e-5, 4))
        outcomes.append(gradients(again))
    assert norm({name: outcomes[0][name] - outcomes[1][name] for name in outcomes[0]}) > 0.01
    raises(GraceError, "this state was saved with", lambda: wrap(again, EXAMPLES).load_state_dict(optimizer.state_dict()))


def case_gradients_that_do_not_count():
    """discard() and zero_grad() drop per-example gradients; what was released by an undone synchronize() stays counted."""
    model = training.make_model()
    optimizer = wrap(model, NOISY)
    for drop in (optimizer.discard, optimizer.zero_grad):
        hvd.per_example_backward(model, loss, *data(hvd.rank()))
        drop()
        assert all(p.grad_sample is None for p in model.parameters()) and optimizer.epsilon(1e-5) == 0
    hvd.per_example_backward(model, loss, *data(hvd.rank()))
    optimizer.synchronize()
    optimizer.undo()
    optimizer.step()
    assert math.isclose(optimizer.epsilon(1e-5), NOISY.epsilon(1e-5, 2))


def case_horovods_own_compressions_are_made_private_too():
    for compression in (None, hvd.Compression.none, hvd.Compression.fp16):
        model = training.make_model()
        optimizer = hvd.DistributedOptimizer(sgd(model), model.named_parameters(), compression=compression, privacy=RANKS)
        (1000 * training.loss_of(model, hvd.rank(), 0)).backward()
        optimizer.step()
        assert 0 < norm(gradients(model)) <= CLIP * 1.01


def case_sparse_gradients():
    """Their row numbers would travel: refused, unless they are made dense."""
    for dense in (False, True):
        model = torch.nn.EmbeddingBag(10, 4, sparse=True)
        optimizer = wrap(model, RANKS, sparse_as_dense=dense)
        model(torch.tensor([[1, 2], [3, 4]])).sum().backward()
        if dense:
            optimizer.step()
            assert not model.weight.grad.is_sparse and norm(gradients(model)) <= CLIP * 1.01
        else:
            raises(UnsupportedError, "which rows it has tells about the examples", optimizer.step)


def case_batch_normalization():
    """Is refused for both units, with parameters of its own and without; not in eval mode, nor other normalizations."""
    for privacy in (RANKS, EXAMPLES):
        for layer, refused in (
            (torch.nn.BatchNorm1d(4), True), (torch.nn.BatchNorm1d(4, affine=False), True), (torch.nn.BatchNorm1d(4).eval(), False),
            (torch.nn.GroupNorm(2, 4), False), (torch.nn.LayerNorm(4), False),
        ):  # fmt: skip
            model = torch.nn.Sequential(torch.nn.Linear(3, 4), layer)
            optimizer = wrap(model, privacy)
            if refused:
                raises(UnsupportedError, "batch normalization", optimizer.step)
                x = torch.zeros(2, 3)
                raises(UnsupportedError, "batch normalization", lambda m=model, x=x: hvd.per_example_backward(m, loss, x, x))
            else:
                optimizer.step()


def case_what_is_refused():
    model = training.make_model()
    raises(UnsupportedError, "scaler= cannot be used with privacy", lambda: wrap(model, RANKS, scaler=torch.amp.GradScaler("cpu")))
    raises(ParameterError, "privacy clips to 0.5", lambda: wrap(model, RANKS, clip_before=1.0))
    raises(ParameterError, "privacy must be Privacy", lambda: wrap(model, "gaussian"))
    raises(SpecSyntaxError, "give one of them", lambda: wrap(model, RANKS, "gaussian | none"))
    lbfgs = torch.optim.LBFGS(model.parameters())
    raises(UnsupportedError, "LBFGS", lambda: hvd.DistributedOptimizer(lbfgs, model.named_parameters(), compression="gaussian | none"))
    raises(
        UnsupportedError, "LocalSGD makes steps", lambda: hvd.LocalSGD(sgd(model), model.named_parameters(), compression="gaussian | none")
    )
    raises(UnsupportedError, "makes no gradient private", lambda: wrap(model, g="topk + residual", simulate=True).epsilon(1e-5))
    raises(ParameterError, "of the same examples", lambda: hvd.per_example_backward(model, loss, torch.zeros(2), torch.zeros(3)))


def case_examples_need_gradients_of_their_own():
    """backward() gives one gradient of the whole batch: refused before anything is sent; and Opacus' for unit 'rank'."""
    model = training.make_model()
    optimizer = wrap(model, EXAMPLES)
    loss(model(data(hvd.rank())[0]), data(hvd.rank())[1]).backward()
    raises(UnsupportedError, "no per-example gradients", optimizer.step)
    model = training.make_model()
    optimizer = wrap(model, RANKS)
    hvd.per_example_backward(model, loss, *data(hvd.rank()))
    raises(UnsupportedError, "grad_sample", optimizer.step)
    model = training.make_model()
    optimizer = wrap(model, EXAMPLES)
    hvd.per_example_backward(model, loss, *data(hvd.rank()))
    model[0].weight.grad_sample.pop()
    model[0].weight.grad_sample.append(torch.zeros(3, *model[0].weight.shape))
    raises(GraceError, "different numbers of examples", optimizer.step)


hvd.init()
torch.manual_seed(0)  # the same models on all ranks
run_cases(hvd, globals())
