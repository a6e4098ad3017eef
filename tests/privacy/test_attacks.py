"""What an observer learns: the operators against equations, the attacks on gradients whose answer is known, and `grace-ext privacy`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="pip install 'grace_ext[torch]'")
pytest.importorskip("skimage", reason="pip install 'grace_ext[privacy]'")
pytest.importorskip("mlxtend", reason="pip install 'grace_ext[privacy]'")

from torch import nn  # noqa: E402

import grace_ext  # noqa: E402
from grace_ext.attacks import inversion, membership, study  # noqa: E402
from grace_ext.attacks.observer import ObservedRank  # noqa: E402
from grace_ext.attacks.victim import Victim, checked, mlp, victim  # noqa: E402
from grace_ext.cli.app import app  # noqa: E402
from grace_ext.cli.privacy import applicable  # noqa: E402
from grace_ext.compressors.base import whole  # noqa: E402
from grace_ext.errors import GraceError, ModelError, ParameterError, UnsupportedError  # noqa: E402
from grace_ext.studies.data import mnist  # noqa: E402
from grace_ext.testing.worlds import tapped  # noqa: E402

from ..catalog import COMPRESSORS  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::grace_ext.errors.BiasedCompressorWarning")


def matrix(seed=0, shape=(24, 50)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nothing(done):
    pass


@pytest.fixture(scope="module")
def digits() -> Victim:
    return victim("mlp")


@pytest.fixture(scope="module")
def small() -> Victim:
    """A convolution of sigmoids, for digits of 7 x 7."""
    inputs, targets = mnist()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(588, 10))
        return checked("small", (net, None, (nn.functional.avg_pool2d(inputs[:100], 4), targets[:100])))


def rows(plan, *specs):
    return {(row.spec, row.attack, row.attacker): row for row in study.run(plan, specs, nothing)}


# --- what is observed -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", COMPRESSORS)
def test_what_travelled_says_of_the_raw_gradient_what_is_declared(text):
    """For every registered compressor, at two steps of a real exchange: the operator of the raw gradient is what was observed, at least as
    exactly as the raw gradient is what was decoded; and it can be differentiated."""
    rank = ObservedRank(f"{text} + none")
    for step in range(2):
        raw = matrix(step)
        leak = rank.step({"w": raw}, lr=0.1)
        values, operator = leak.observed["w"]
        x = raw.reshape(-1).clone().requires_grad_()
        seen = operator(x)
        assert seen.shape == values.shape and bool(torch.autograd.grad(seen.square().sum(), x)[0].any())
        lost = float((leak.decoded["w"] - raw).norm())
        assert float((values - seen.detach()).norm()) <= lost * (1 + 1e-6) + 1e-5 * float(raw.norm())
        compressor = grace_ext.grace(f"{text} + none").compressor
        if operator is whole and compressor.result == "mean" and not compressor.rounds:
            assert torch.equal(values.float(), leak.decoded["w"].reshape(-1))


@pytest.mark.parametrize("text", ["topk(ratio=0.1)", "randomk(ratio=0.1)", "randomk(ratio=0.1, scale=True)", "dgc(ratio=0.1)"])
def test_sparse_payloads_give_away_their_elements_exactly(text):
    """All of them, at the positions that are decoded to something, without the factor that makes some unbiased."""
    raw = matrix()
    leak = ObservedRank(f"{text} + none").step({"w": raw})
    sent = np.flatnonzero(leak.decoded["w"].numpy())
    values, operator = leak.observed["w"]
    assert np.allclose(values.numpy(), raw.numpy().reshape(-1)[sent], rtol=1e-6, atol=0)
    assert torch.equal(operator(raw.reshape(-1)), raw.reshape(-1)[sent]) and len(sent) >= 100


@pytest.mark.parametrize(("text", "error"), [("powersgd(rank=3)", 1e-5), ("lqsgd(rank=3, bits=12)", 1e-2)])
def test_low_rank_payloads_give_away_both_products(text, error):
    """M Q0 and P^T M, of which numpy's QR computes the spaces: nothing is known of what is orthogonal to both. At the second step Q0 is the
    state that the first has left behind."""
    rank = ObservedRank(f"{text} + none")
    for step in range(2):
        m = matrix(step).double().numpy()
        state = rank.cluster.state_dict()["ranks"][0]["state"] if step else {}
        start = next((np.asarray(array, np.float64).reshape(3, 50).T for array in state.values()), None)
        values, operator = rank.step({"w": matrix(step)}).observed["w"]
        assert values.shape == (3 * (24 + 50),)
        known = operator(torch.from_numpy(m.reshape(-1)).float())
        assert float((known - values).norm()) <= error * float(values.norm())
        if start is None:
            continue
        right, left = np.linalg.qr(start)[0], np.linalg.qr(m @ start)[0]
        hidden = (np.eye(24) - left @ left.T) @ m @ (np.eye(50) - right @ right.T)
        unseen = operator(torch.from_numpy(hidden.reshape(-1)).float())
        assert float(unseen.norm()) <= error * np.linalg.norm(hidden)
        # The operator keeps the norm of M V and of P^T M.
        expected = np.hypot(np.linalg.norm(m @ right), np.linalg.norm(left.T @ m))
        assert float(known.norm()) == pytest.approx(expected, rel=10 * error)


def test_a_refresh_of_powersgd_plus_gives_everything_away():
    rank = ObservedRank("powersgd_plus(rank=2, refresh_period=2) + none")
    for step in range(3):
        values, operator = rank.step({"w": matrix(step)}).observed["w"]
        assert (operator is whole) == (step % 2 == 0)
        assert operator is not whole or torch.equal(values, matrix(step).reshape(-1))


@pytest.mark.parametrize("text", ["topk(ratio=0.1)", "powersgd", "lqsgd", "scaled_int", "none"])
def test_the_payload_is_what_the_collectives_carry(text):
    """Every piece that is attacked is part of the bytes of a collective, and together they are all of its payload."""
    rank = ObservedRank(f"{text} + none")
    with tapped() as seen:
        leak = rank.step({"w": matrix()})
    pieces = leak.sent["w"].payload
    wire = b"".join(collective.buffers[0] for collective in seen)
    carried = [piece.tobytes() for piece in pieces]
    if text == "scaled_int":  # an integer sum travels in wider integers in this cluster
        carried = [carried[0], np.frombuffer(carried[1], np.int32).astype(np.int64).tobytes()]
    assert all(piece in wire for piece in carried)
    assert rank.cluster.wire_bytes[0] - sum(map(len, pieces)) <= 24 * len(seen)  # headers, or one flag each


def test_memories_policies_and_noise_are_observed_too():
    """Error feedback adds what was not sent; a policy sends small tensors as they are; noise is in what is observed."""
    rank = ObservedRank("topk(ratio=0.1) + residual")
    first, second = rank.step({"w": matrix()}), rank.step({"w": matrix(1)})
    residual = matrix() - first.decoded["w"]
    sent = second.decoded["w"] != 0
    assert torch.allclose(second.observed["w"].values, (matrix(1) + residual)[sent])
    leak = ObservedRank("by_size(large=topk(ratio=0.1) + residual, min_elements=100)").step({"w": matrix(), "b": matrix(2, (50,))})
    assert leak.observed["b"].operator is whole and leak.observed["w"].operator is not whole
    assert torch.equal(leak.observed["b"].values, matrix(2, (50,))) and leak.says_more
    noisy = ObservedRank("gaussian(clip=1, noise_multiplier=1) | none").step({"w": matrix()})
    assert 0.8 < float((noisy.observed["w"].values - matrix().reshape(-1) / matrix().norm()).std()) < 1.2
    assert not noisy.says_more


@pytest.mark.parametrize("spec", ["topk + residual @ reduce_scatter", "topk + residual @ hierarchical", "signsgd + none @ allreduce"])
def test_communicators_that_cut_payloads_are_refused(spec):
    with pytest.raises(UnsupportedError, match="leave out '@"):
        ObservedRank(spec).step({"w": matrix()})


# --- attacks --------------------------------------------------------------------------------------------------------------
def test_a_fully_connected_layer_gives_its_input_away(digits):
    """Without optimization: exact for dense gradients and for those of rank 1, which powersgd sends whole. To know the compressor helps."""
    found = rows(study.Plan(digits, ["analytic"], images=3), *(f"{text} + none" for text in ("none", "powersgd(rank=1)", "lqsgd", "topk",
                 "randblock(ratio=0.25)")))  # fmt: skip
    for text, floor in (("none", 100), ("powersgd(rank=1)", 60), ("lqsgd", 45)):
        for attacker in inversion.ATTACKERS:
            row = found[f"{text} + none", "analytic", attacker]
            assert row.psnr >= floor and row.ssim > 0.99 and row.labels == 1
    naive, adaptive = (found["randblock(ratio=0.25) + none", "analytic", attacker] for attacker in inversion.ATTACKERS)
    assert naive.psnr < 15 < 60 < adaptive.psnr
    naive, adaptive = (found["topk + none", "analytic", attacker] for attacker in inversion.ATTACKERS)
    assert 15 < naive.psnr <= adaptive.psnr < 40
    guess = found["-", "guess", "-"]
    assert guess.psnr < 12 and guess.labels is None and guess.attacker == "-"


@pytest.mark.parametrize("name", grace_ext.compressors.names())
def test_who_knows_the_compressor_recovers_no_less(digits, name):
    """Up to half a decibel of rounding errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive, adaptive, _ = study.run(study.Plan(digits, ["analytic"], images=2), [f"{name} + none"], nothing)
    assert adaptive.psnr >= naive.psnr - 0.5


def test_of_many_inputs_that_fit_the_least_is_found():
    """A projection on two columns tells two numbers of an input: the least squares are found, and no rounding errors are added to them."""
    x, rows = torch.rand(784), torch.randn(32)
    seen = ObservedRank("random_projection(rank=2)").step({"w": torch.outer(rows, x)}).observed["w"]
    found = inversion._fitted(seen, rows, 784)
    assert float(found.norm()) <= float(x.norm())
    again = seen.operator(torch.outer(rows, found.float()).reshape(-1))
    assert float((again - seen.values).norm()) <= 1e-5 * float(seen.values.norm())


def test_noise_keeps_the_input_private(digits):
    for spec in ("gaussian(clip=1, noise_multiplier=1) | none", "gaussian(unit='example', batch=1.0) | topk(ratio=0.1) + residual"):
        found = rows(study.Plan(digits, ["analytic"], images=3), spec)
        for attacker in inversion.ATTACKERS:
            row = found[spec, "analytic", attacker]
            assert row.psnr < 12 and row.ssim < 0.3


def test_error_feedback_blurs_later_steps(digits):
    """The third step sends what the first two have left, with weights that stand still."""
    first, third = (rows(study.Plan(digits, ["analytic"], images=3, step=step), "topk + residual") for step in (1, 3))
    key = ("topk + residual", "analytic", "adaptive")
    assert third[key].psnr < first[key].psnr
    with pytest.raises(ParameterError, match="need 7500 examples, and there are 5000"):
        study.Plan(digits, ["analytic"], images=2500, step=3)


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_labels_are_read_off_the_last_bias(digits, batch):
    """Repeated ones too: the first 16 digits, whose labels occur up to twice in a batch of 8."""
    right = 0
    for number in range(16 // batch):
        chosen = torch.arange(number * batch, (number + 1) * batch)
        leak = ObservedRank("none").step(digits.gradients(digits.inputs[chosen], digits.targets[chosen]))
        right += study.common(inversion.labels_of(digits, leak, batch).tolist(), digits.targets[chosen].tolist())
    assert right == 16 if batch == 1 else right >= 14


def test_rows_of_a_batch_are_candidates_and_are_assigned_to_their_nearest(digits):
    truth = digits.inputs[:3]
    assert torch.equal(study.in_order(truth, truth[[2, 0, 1]] + 0.01), truth + 0.01)
    assert torch.equal(study.in_order(truth, truth[1:2])[1], truth[1])  # too few candidates
    found = rows(study.Plan(digits, ["analytic"], images=4, batch=2), "none")
    assert found["none", "analytic", "naive"].psnr > 12 > found["-", "guess", "-"].psnr


def test_matching_directions_recovers_an_image_and_knowing_the_compressor_helps(small):
    plan = study.Plan(small, ["cosine"], images=1)
    guess = rows(plan)["-", "guess", "-"]
    scores = {}
    for spec in ("none", "topk(ratio=0.05) + none", "topk(ratio=0.02) + none", "powersgd(rank=1) + none"):
        leak = study.leak_of(plan, spec, 0)
        for attacker in inversion.ATTACKERS:
            target, generator = inversion.target_of(leak, attacker), torch.Generator().manual_seed(0)
            found = inversion.cosine(plan.victim, target, inversion.labels_of(plan.victim, leak, 1), generator, nothing, steps=300)
            scores[spec, attacker] = study.compared(plan.victim, plan.victim.inputs[:1], found)[1]
    assert scores["none", "naive"] > guess.psnr + 8
    for spec in ("topk(ratio=0.05) + none", "topk(ratio=0.02) + none"):
        assert scores[spec, "adaptive"] > scores[spec, "naive"] + 4
    for attacker in inversion.ATTACKERS:  # the linear layer, which has nearly all of the elements, has a gradient of rank 1
        assert scores["powersgd(rank=1) + none", attacker] == pytest.approx(scores["none", "naive"], abs=1)


def test_matching_gradients_recovers_an_image_and_its_label(small):
    plan, done = study.Plan(small, ["dlg"], images=1), []
    naive, adaptive, _ = study.run(plan, ["none"], done.append)
    assert naive.psnr > 40 and naive.ssim > 0.98 and torch.equal(adaptive.inputs, naive.inputs)
    assert sum(done) == pytest.approx(2)


def test_members_have_lower_losses_and_noise_hides_them():
    """A network that knows 100 digits by heart; compression changes nothing much, noise on each example does."""
    auc = {
        name: membership.infer(spec, lambda seed: victim("mlp", seed), nothing, seeds=(0, 1), members=100, epochs=40)
        for name, spec in (("dense", "none"), ("topk", "topk(ratio=0.1) + residual"), ("private", membership.PRIVATE))
    }
    assert auc["dense"].train == 1 and auc["dense"].auc > 0.6
    assert auc["topk"].auc == pytest.approx(auc["dense"].auc, abs=0.02)
    assert auc["private"].auc < auc["dense"].auc - 0.02


# --- a user's own model ---------------------------------------------------------------------------------------------------
GOOD = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Sigmoid(), nn.Linear(12, 10))

def table():
    net = nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 3))
    inputs = torch.randn(40, 6)
    return net, nn.CrossEntropyLoss(), (inputs, torch.arange(40) % 3)

def number(): return 5
def wide(): return nn.Linear(3, 2)
def vector(): return nn.Sequential(nn.Flatten(0), nn.Linear(2 * 784, 10))
def frozen(): return plain().requires_grad_(False)
def lossless(): return plain(), 3
def flat_loss(): return plain(), lambda scores, targets: 0 * scores.sum()
def uneven(): return plain(), None, (torch.zeros(4, 1, 28, 28), torch.zeros(3))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_attacked.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine_attacked", None)


def test_a_model_of_ones_own_is_attacked(mine):
    found = rows(study.Plan(victim("mine_attacked:plain"), ["analytic"], images=2), "none")
    assert found["none", "analytic", "naive"].psnr == 100
    own = victim("mine_attacked:table")  # no images, and a loss of its own, whose labels no rule gives
    found = rows(study.Plan(own, ["analytic", "cosine"], images=2), "none")
    assert found["none", "analytic", "naive"].psnr == 100 and found["none", "analytic", "naive"].ssim is None
    assert found["none", "cosine", "naive"].labels is None and found["none", "cosine", "naive"].psnr > found["-", "guess", "-"].psnr


@pytest.mark.parametrize(("name", "told"), [
    ("number", "returns int, not a torch model"), ("wide", "fails on inputs of shape"), ("vector", r"scores of shape \[10\]"),
    ("frozen", "no parameters that are trained"), ("lossless", "loss of type int"), ("flat_loss", "gradient of zeros"),
    ("uneven", "4 inputs and 3 targets"), ("nowhere", "has no 'nowhere'"),
])  # fmt: skip
def test_a_model_that_cannot_be_attacked_is_told_why(mine, name, told):
    with pytest.raises(ModelError, match=told):
        victim(f"mine_attacked:{name}")


def test_an_unknown_model_is_told_what_there_is():
    with pytest.raises(ModelError, match="'lenet', 'mlp' or module:callable"):
        victim("resnet")


# --- the command ----------------------------------------------------------------------------------------------------------
def test_the_command_prints_a_table_and_draws_a_picture(tmp_path):
    """In a process of its own: both attackers, dense and guess, the verdict, and a picture."""
    file = tmp_path / "out.png"
    command = [sys.executable, "-m", "grace_ext", "privacy", "powersgd(rank=1)", "--model", "mlp", "--attack", "analytic", "--images", "2"]
    done = subprocess.run([*command, "--picture", str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table[1:6]] == ["none", "none", "powersgd(rank=1)", "powersgd(rank=1)", "-"]
    assert all(word in done.stdout for word in ("naive", "adaptive", "guess", "100.0 dB", "2 of 2", "Compression is not a defence"))
    assert "powersgd(rank=1) was given no memory" in done.stdout and file.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_one_document(monkeypatch):
    monkeypatch.setattr(membership, "infer", lambda spec, *_: membership.Membership(spec, 0.5, 1.0, 0.9))
    options = ["privacy", "topk(ratio=0.1)", "gaussian | none", "--model", "mlp", "--attack", "analytic", "--images", "1", "--membership"]
    done = CliRunner().invoke(app, [*options, "--json"])
    found = json.loads(done.stdout)
    specs = ["none @ allreduce", "topk(ratio=0.1) + residual @ allgather", "gaussian(clip=1.0, noise_multiplier=1.0) | none @ allreduce"]
    assert [row["spec"] for row in found["rows"]] == [spec for spec in specs for _ in range(2)] + ["-"]
    assert [row["attacker"] for row in found["rows"][:2]] == ["naive", "adaptive"] and found["rows"][0]["psnr"] == 100
    assert [row["spec"] for row in found["membership"]][:3] == specs and "unit='example'" in found["membership"][3]["spec"]
    assert found["verdict"].startswith("Compression is not a defence") and len(found["notices"]) == 1


@pytest.mark.parametrize(("options", "told"), [
    (["--attack", "guessing"], "--attack is one of analytic, dlg, cosine"), (["--attack", "analytic"], "--model mlp"),
    (["topj"], "topk"), (["--picture", "no/such/folder.png"], "cannot write the picture"), (["--model", "nothing:at_all"], "nothing"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_attacked(options, told):
    outcome = CliRunner().invoke(app, ["privacy", *options])
    assert isinstance(outcome.exception, GraceError) and told in str(outcome.exception), outcome.exception


def test_the_usual_attacks_are_those_that_are_quick(digits, small):
    assert applicable(None, digits, "mlp") == ["analytic", "cosine"] and applicable(None, small, "small") == ["cosine"]
    assert applicable(["dlg", "analytic", "dlg"], digits, "mlp") == ["dlg", "analytic"]


def test_without_torch_the_command_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more))
    outcome = CliRunner().invoke(app, ["privacy"])
    assert isinstance(outcome.exception, UnsupportedError) and "pip install 'grace_ext[torch,privacy]'" in str(outcome.exception)


def test_the_mlp_is_that_of_the_docs():
    assert [tuple(p.shape) for p in mlp().parameters()] == [(128, 784), (128,), (10, 128), (10,)]
