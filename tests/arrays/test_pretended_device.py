"""The pretended device behaves as CUDA does where that matters: it mixes no devices, and counts what makes the host wait."""

from __future__ import annotations

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


def test_nothing_is_left_behind():
    """Outside of `pretended` torch is as it was: without a GPU it makes no tensor there."""
    before = torch.cuda._lazy_init, torch.tensor, torch.cuda.is_initialized()
    assert PretendedOps().zeros(3).device == DEVICE
    assert (torch.cuda._lazy_init, torch.tensor, torch.cuda.is_initialized()) == before
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(3, device=DEVICE)
