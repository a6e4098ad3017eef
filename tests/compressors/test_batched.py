"""Tests the form that compresses all tensors of a bucket at once on a device against each tensor by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grace_ext import grace
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.compressors.forms.batched import BatchedSelecting
from grace_ext.compressors.forms.batched_signs import BatchedSigns
from grace_ext.compressors.forms.merged import Merged
from grace_ext.errors import PayloadError
from grace_ext.frameworks.torch.ops import TorchOps
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import WITH_DEVICE

#: Sizes with every kind of positions: all elements are sent (1), a bitmap or Elias-Fano, by the ratio; odd numbers of bits.
SIZES = {"odd": 1000, "one": 1, "few": 7, "long": 20_011, "square": 4096}
SPECS = tuple(TensorSpec(name, (size,)) for name, size in SIZES.items())
WHOLE = TensorSpec("all", (sum(SIZES.values()),))
INFO = StepInfo(3, 0, 2, 2, 0, None, WHOLE.size)
SPARSE = ["topk(ratio=0.01)", "topk(ratio=0.4)", "topk(ratio=1)", "topk(ratio=0.03, values='fp16')"]
COMPRESSORS = [*SPARSE, "efsignsgd", "onebit", "signsgd", "signsgd(ties='plus')"]


def batched(text: str) -> tuple[Merged, TorchOps]:
    found = grace(f"{text} + none").compressor.batched(SPECS)
    assert isinstance(found, BatchedSelecting | BatchedSigns)
    return found, TorchOps("cpu").deferring()


def values(seed: int = 0) -> np.ndarray:
    """Returns values with many ties."""
    return np.random.default_rng(seed).integers(-40, 41, WHOLE.size).astype(np.float32)


@pytest.mark.parametrize("text", COMPRESSORS)
def test_the_bytes_are_those_of_each_tensor(text):
    whole, ops = batched(text)
    x, sent = values(), []
    (data,), _ = whole.compress(ops, torch.from_numpy(x), WHOLE, INFO, {})
    plain = TorchOps("cpu")
    for spec, piece in zip(SPECS, np.split(x, whole.ends[:-1]), strict=True):
        sent += whole.each.compress(plain, torch.from_numpy(piece), spec, INFO, {})[0]
    assert data.numpy().tobytes() == torch.cat(sent).numpy().tobytes()
    decoded = whole.decompress(ops, (data,), WHOLE, INFO)
    rest = torch.from_numpy(x.copy())
    whole.remove(ops, rest, (data,), WHOLE, INFO)
    assert ops.judged([]) == [] and np.array_equal(rest.numpy(), x - decoded.numpy())


@pytest.mark.parametrize("text", COMPRESSORS)
def test_the_mean_is_that_of_each_rank(text):
    whole, ops = batched(text)
    payloads = [whole.compress(ops, torch.from_numpy(values(rank)), WHOLE, INFO, {})[0] for rank in range(3)]
    mean = whole.combine(ops, payloads, WHOLE, INFO)
    total = sum(whole.decompress(ops, payload, WHOLE, INFO).double() for payload in payloads)
    expected = torch.sign(total) if "signsgd" == text[:7] else total / INFO.divisor
    assert np.allclose(mean.double().numpy(), expected.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", SPARSE[:2])
def test_any_broken_payload_is_refused_and_names_its_rank(text):
    """Whatever byte of the positions changes: what decodes to other positions is valid, all else is an error, and never a crash."""
    whole, ops = batched(text)
    good = [whole.compress(ops, torch.from_numpy(values(rank)), WHOLE, INFO, {})[0] for rank in range(2)]
    draws, refused = np.random.default_rng(1), 0
    _, *index = whole._bytes
    places = [np.arange(its.total) + its.shift[np.searchsorted(its.ends, np.arange(its.total), side="right")] for its in index]
    for at in draws.choice(np.concatenate(places), 200, replace=False):
        broken = good[1][0].clone()
        broken[at] ^= int(draws.integers(1, 256))
        try:
            whole.combine(ops, [good[0], (broken,)], WHOLE, INFO)
            ops.judged([])
        except PayloadError as error:
            refused += 1
            assert error.rank == 1
        finally:
            ops.forget()
    assert refused > 100


def test_values_that_are_not_finite_are_refused():
    whole, ops = batched("topk(ratio=0.01)")
    (data,), _ = whole.compress(ops, torch.from_numpy(values()), WHOLE, INFO, {})
    data[:4] = torch.tensor([0, 0, 0xC0, 0x7F])  # NaN
    whole.combine(ops, [(data,)], WHOLE, INFO)
    with pytest.raises(PayloadError, match="rank 0 for 'odd': .*not finite"):
        ops.judged([])


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_that_cannot_be_are_refused(value):
    whole, ops = batched("efsignsgd")
    payloads = [whole.compress(ops, torch.from_numpy(values(rank)), WHOLE, INFO, {})[0] for rank in range(2)]
    payloads[1][0][:4] = torch.from_numpy(np.float32([value]).view(np.uint8))
    whole.combine(ops, payloads, WHOLE, INFO)
    with pytest.raises(PayloadError, match="rank 1 for 'odd': .*negative or not finite"):
        ops.judged([])


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (2048,), (2047, 2049, 4096, 5000), (3, 700, 100_000, 1), tuple(range(1, 40))])
def test_the_sums_of_all_tensors_have_the_bits_of_each(sizes):
    """A tensor's sum does not depend on its place among others, or on their lengths; a short tensor folds as if it were alone."""
    draws = np.random.default_rng(len(sizes))
    x = (draws.standard_normal(sum(sizes)) * 10 ** draws.uniform(-8, 8, sum(sizes))).astype(np.float32)
    ends, plain = np.cumsum(sizes), NumpyOps()
    found = TorchOps("cpu").sums_of_each(torch.from_numpy(x), ends).numpy()
    expected = [plain.block_norms(piece, len(piece), 1)[0] for piece in np.split(x, ends[:-1])]
    assert found.tobytes() == np.array(expected).tobytes() == plain.sums_of_each(x, ends).tobytes()


BUCKETS = [
    "signsgd + none @ allgather", "signsgd(ties='plus') + residual @ allgather", "efsignsgd + residual", "efsignsgd(block=64) + residual",
    "onebit + residual(beta=0.9)", "topk(ratio=0.02) + residual", "randomk(ratio=0.1) + residual(beta=0.9)", "none + none", "fp16 + none",
]  # fmt: skip


@pytest.mark.parametrize("text", BUCKETS)
def test_a_bucket_equals_that_of_the_host(text):
    """A device, whose ranks batch, and a host, whose ranks do not, end with the same bits."""
    by_name = {world.name: world for world in WITH_DEVICE}
    host, devices = by_name["numpy"], [by_name["torch-device"], by_name["torch-cuda"]]
    clusters = [(world, world.cluster(grace(text), 2)) for world in (host, *devices)]
    ends = np.cumsum(list(SIZES.values()))[:-1]
    for step in range(3):
        given = [dict(zip(SIZES, np.split(values(10 * step + rank), ends), strict=True)) for rank in (0, 1)]
        for its in given:
            its["few"] = its["few"] * (step != 1)  # a tensor of zeros
        expected, *found = [world.step(cluster, given) for world, cluster in clusters]
        for ours in found:
            assert all(np.array_equal(ours[name], expected[name]) for name in SIZES)
