"""OneBitAdam is AdamW in its dense steps, then 1-bit Adam: compared with torch, with the equations in float64, and in real jobs."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import ParameterError, UnsupportedError

torch = pytest.importorskip("torch")

from grace_ext.frameworks.torch.onebit_adam import OneBitAdam  # noqa: E402

from .test_jobs import cases_of, held  # noqa: E402

CASES = cases_of("onebit_job.py")
FREEZE, STEPS, RANKS = 12, 40, 2
SHAPE = (6, 8)
B1, B2, EPS, LR, DECAY = 0.9, 0.999, 1e-8, 0.01, 0.1


@pytest.mark.parametrize("case", CASES)
def test_torchrun(case):
    assert case in held("torchrun", 2, "onebit_job.py")


@pytest.mark.parametrize("case", [case for case in CASES if "ddp" not in case])
def test_horovodrun(case):
    assert case in held("horovodrun", 2, "onebit_job.py")


def gradients(step: int) -> list[np.ndarray]:
    """Returns gradients by rank that do not depend on the weights, so that rounding cannot grow."""
    return [np.random.default_rng([rank, step]).standard_normal(SHAPE) + np.cos(np.arange(8)) for rank in range(RANKS)]


class Trained:
    """Trains weights that begin at 1 with OneBitAdam on simulated ranks. path: the weights after each step. errors: the ranks' residuals at
    the end."""

    def __init__(self, spec: str, given=gradients, steps: int = STEPS):
        x = torch.nn.Parameter(torch.ones(SHAPE))
        optimizer = OneBitAdam([x], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY, freeze_step=FREEZE)
        cluster, self.path = grace_ext.LocalCluster(grace_ext.grace(spec), RANKS, framework="torch"), []
        for step in range(steps):
            x.grad = cluster.step([{"x": torch.tensor(g, dtype=torch.float32)} for g in given(step)])["x"]
            optimizer.step()
            self.path.append(x.detach().numpy().astype(np.float64))
        self.variance = optimizer.state[x]["exp_avg_sq"].numpy()
        held = [rank["state"] for rank in cluster.state_dict()["ranks"]]
        self.errors = [arrays["residual/x"].reshape(SHAPE) for arrays in held if "residual/x" in arrays]


def signs(x: np.ndarray) -> np.ndarray:
    return np.abs(x).mean() * np.where(x >= 0, 1.0, -1.0)


def paper(twice: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Computes 1-bit Adam as Tang et al. 2021 write it (algorithm 1): every worker adds its gradient to the momentum that all share, and
    compresses the sum and its own error; with `twice` the server (one rank, for so small a tensor) does the same with the mean. Adam's
    corrections of the bias and the decay of AdamW are added; the correction of the variance is that of the last dense step. Returns the
    weights after each step, and the workers' errors at the end."""
    x, m, v, path = np.ones(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE), []
    worker, server = [np.zeros(SHAPE)] * RANKS, np.zeros(SHAPE)
    for step in range(STEPS):
        t, each = step + 1, [B1 * m + (1 - B1) * g for g in gradients(step)]
        if t <= FREEZE:
            m, v = sum(each) / RANKS, B2 * v + (1 - B2) * (sum(gradients(step)) / RANKS) ** 2
        else:
            compensated = [own + error for own, error in zip(each, worker, strict=True)]
            sent = [signs(p) for p in compensated]
            worker = [p - s for p, s in zip(compensated, sent, strict=True)]
            m = sum(sent) / RANKS
            if twice:
                whole = m + server
                m = signs(whole)
                server = whole - m
        x = x - LR * DECAY * x
        x = x - LR * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2 ** min(t, FREEZE))) + EPS)
        path.append(x)
    return path, worker


@pytest.mark.parametrize("communicator", ["allgather", "reduce_scatter"])
def test_it_is_the_paper_s_algorithm(communicator):
    """At every step, dense and compressed, the weights are those of the equations in float64; the memory's residual is the paper's error
    divided by 1 - b1, because the memory adds gradients where the paper adds (1 - b1) times these."""
    done = Trained(f"warmup(steps={FREEZE}, then=efsignsgd + momentum_compression @ {communicator})")
    path, errors = paper(communicator == "reduce_scatter")
    for step in range(STEPS):
        assert np.abs(done.path[step] - path[step]).max() < 2e-6, step
    for residual, error in zip(done.errors, errors, strict=True):
        assert np.abs((1 - B1) * residual - error).max() < 1e-6
    assert np.abs(done.path[-1] - paper(communicator != "reduce_scatter")[0][-1]).max() > 1e-3  # the other form leads elsewhere


def test_the_dense_steps_are_adamw():
    """Without a memory they are torch's AdamW bit for bit; with it the gradient is a difference of momenta, equal up to rounding."""
    x = torch.nn.Parameter(torch.ones(SHAPE))
    adamw = torch.optim.AdamW([x], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY, foreach=False)
    exact = Trained("none").path
    rounded = Trained(f"warmup(steps={FREEZE}, then=efsignsgd + momentum_compression)").path
    for step in range(STEPS):
        x.grad = torch.tensor(sum(g.astype(np.float32) for g in gradients(step)) / np.float32(RANKS))
        adamw.step()
        if step < FREEZE:
            assert np.array_equal(exact[step], x.detach().numpy().astype(np.float64)), step
            assert np.abs(rounded[step] - exact[step]).max() < 1e-6, step
    assert np.abs(exact[-1] - x.detach().numpy()).max() > 1e-4  # then the variance is frozen


def sparse_rows(step: int) -> list[np.ndarray]:
    """Returns gradients of which row 0 is always zero, row 1 zero in the dense steps, and row 2 tiny in them."""
    both = gradients(step)
    for g in both:
        g[0] = 0
        g[1] *= step >= FREEZE
        g[2] *= 1 if step >= FREEZE else 1e-6
    return both


@pytest.mark.parametrize("compressor", ["efsignsgd(block=8)", "efsignsgd", "topk(ratio=0.25)"])
def test_elements_with_few_gradients_stay_in_bounds(compressor):
    """The variance is constant where its estimate was good. Where the momentum outgrows it, it follows, so that no step is longer than
    sqrt(K) lr, Adam's longest. Rows without gradients do not move, if a block is a row."""
    done = Trained(f"warmup(steps={FREEZE}, then={compressor} + momentum_compression)", sparse_rows)
    frozen = Trained("none", sparse_rows, FREEZE).variance
    assert (done.variance[2] > 1e6 * frozen[2]).sum() > 4 and (done.variance >= frozen * (1 - 1e-5)).all()
    longest = LR * (1 - B1) / math.sqrt((1 - B2) * (1 - B1**2 / B2))
    decayed = np.array([np.ones(SHAPE), *done.path[:-1]]) * (1 - LR * DECAY)
    moved = np.abs(np.array(done.path) - decayed)
    assert LR / 2 < moved[FREEZE:, 1:3].max() and moved[FREEZE:].max() <= longest * (1 + 1e-4)
    if "block" in compressor:
        assert moved[:, 0].max() < 1e-7 and np.allclose(done.variance[3:], frozen[3:], rtol=1e-5)


def test_what_it_rejects():
    """Sparse gradients and hyperparameters out of range are errors that name them."""
    x = torch.nn.Parameter(torch.ones(4))
    for bad, text in (({"freeze_step": 0}, "from 1"), ({"freeze_step": 1.5}, "whole number"), ({"betas": (0.9, 1.0)}, "betas"),
                      ({"lr": -1.0}, "negative")):  # fmt: skip
        with pytest.raises(ParameterError, match=text):
            OneBitAdam([x], **{"freeze_step": 5, **bad})
    optimizer = OneBitAdam([x], freeze_step=5)
    x.grad = torch.ones(4).to_sparse()
    with pytest.raises(UnsupportedError, match=r"sparse=False"):
        optimizer.step()


def test_local_sgd_rejects_compressed_momentum():
    """LocalSGD sends how far models have moved, which contains the momentum."""
    from grace_ext.errors import IncompatiblePartsError
    from grace_ext.local.settings import settings_of

    with pytest.raises(IncompatiblePartsError, match="momentum_compression"):
        settings_of("efsignsgd + momentum_compression")
