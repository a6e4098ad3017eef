"""The pretended device behaves as CUDA does where that matters: it mixes no devices, and counts what makes the host wait."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from grace_ext.testing.pretended_device import COUNTS, DEVICE, DeviceTensor, PretendedOps, pretended


def on_device(*values: float) -> DeviceTensor:
    COUNTS.clear()
    return DeviceTensor(torch.tensor(values))


def test_it_says_where_it_is():
    x = on_device(1.0, 2.0)
    assert x.device == DEVICE and x.is_cuda and (x + x)[:1].device == DEVICE and x.shape == (2,) and len(x) == 2
    assert not x.cpu().is_cuda


@pytest.mark.parametrize("mix", [lambda x, y: x + y, lambda x, y: y * x, lambda x, y: torch.cat([x, y]), lambda x, y: x[y.long()]])
def test_devices_do_not_mix(mix):
    with pytest.raises(RuntimeError, match="same device"):
        mix(on_device(0.0, 1.0), torch.tensor([0.0, 1.0]))


def test_a_number_on_the_host_is_taken():
    assert (on_device(1.0, 2.0) * torch.tensor(2.0)).cpu().tolist() == [2.0, 4.0]


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), np.asarray, lambda x: np.add(x, 1)])
def test_it_is_no_numpy_array(convert):
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        convert(on_device(1.0))


def test_writing_into_a_view_changes_the_tensor():
    x = on_device(1.0, 2.0, 3.0)
    x[1:] += 1
    x[:2][x[:2] < 2] = 9.0
    assert x.cpu().tolist() == [9.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("what", "launches", "waits", "copies"),
    [
        (lambda x: x + 1, 1, 0, 0),
        (lambda x: x.reshape(2, 2)[1], 0, 0, 0),
        (lambda x: torch.nonzero(x), 1, 1, 0),
        (lambda x: x[x > 1], 2, 1, 0),
        (lambda x: float(x[0]), 0, 1, 0),
        (lambda x: bool((x > 0).all()), 2, 1, 0),
        (lambda x: x.cpu(), 0, 1, 1),
        (lambda x: x.tolist(), 0, 1, 1),
        (lambda x: torch.ones(2).to(DEVICE), 0, 1, 1),
        (lambda x: torch.ones(2).to(DEVICE, non_blocking=True), 0, 0, 1),
        (lambda x: torch.tensor([1, 2], device=DEVICE), 0, 1, 1),
        (lambda x: torch.zeros(4, device=DEVICE), 1, 0, 0),
    ],
)
def test_counts(what, launches, waits, copies):
    x = on_device(1.0, 2.0, 3.0, 4.0)
    with pretended():
        what(x)
    assert (COUNTS.launches, COUNTS.waits, COUNTS.uploads + COUNTS.downloads) == (launches, waits, copies)


def test_bytes():
    x = on_device(1.0, 2.0, 3.0, 4.0)
    _ = x + 1
    assert (COUNTS.read, COUNTS.written) == (16, 16)


def parameter(*values: float) -> DeviceTensor:
    return torch.nn.Parameter(on_device(*values))


def test_autograd_runs_on_it_and_hooks_get_it():
    x, seen = parameter(1.0, 2.0), []

    def hook(p):
        with pretended():
            p.grad.add_(torch.ones(2, device=DEVICE))
        seen.append((p is x, p.grad is x.grad, p.grad.device))

    x.register_post_accumulate_grad_hook(hook)
    with pretended():
        loss = (x * x).sum()
        COUNTS.clear()
        loss.backward()
    assert seen == [(True, True, DEVICE)] and x.grad.cpu().tolist() == [3.0, 5.0]
    assert (COUNTS.by_name["add"], COUNTS.by_name["ones"], COUNTS.by_name["mul"]) == (1, 1, 0)  # the hook's, and not the pass's


def test_an_optimizer_steps_on_it():
    x = parameter(1.0, 2.0)
    x.grad = on_device(4.0, 8.0)
    torch.optim.SGD([x], lr=0.25).step()
    assert x.detach().cpu().tolist() == [0.0, 0.0]
    x.grad = None
    assert x.grad is None


def test_each_thread_enters_by_itself():
    found = []

    def makes():
        with pretended():
            found.append(torch.zeros(1, device=DEVICE).device)

    with pretended():
        threads = [threading.Thread(target=makes) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
    assert found == [DEVICE, DEVICE]


def test_nothing_is_left_behind():
    """Outside of `pretended` torch is as it was: without a GPU it makes no tensor there."""
    before = torch.cuda._lazy_init, torch.tensor, torch.cuda.is_initialized()
    assert PretendedOps().zeros(3).device == DEVICE
    assert (torch.cuda._lazy_init, torch.tensor, torch.cuda.is_initialized()) == before
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(3, device=DEVICE)
