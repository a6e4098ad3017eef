"""All index codings: round trips, sizes, bounds, and decoding of arbitrary bytes."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.compressors.forms.positions import CODINGS, decode_indices, encode_indices, index_bytes, max_index_bytes
from grace_ext.errors import PayloadError
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing.worlds import NUMPY

TINY = [(k, d) for d in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64) for k in range(d + 1)]
LARGE = [(k, d) for d in (1000, 65535, 65536, 65537, 200_000) for k in (1, 2, 10, 999, d // 3, d - 1) if k < d]


def choices(k: int, d: int):
    """Returns k positions at the start, at the end, and at random."""
    anywhere = np.sort(np.random.default_rng(k + d).permutation(d)[:k])
    return np.arange(k), np.arange(d - k, d), anywhere


@pytest.mark.parametrize("index", CODINGS)
def test_round_trip(world, index):
    """Positions survive for every k of small d, and for large d around the block size."""
    ops = world.ops
    for k, d in TINY + (LARGE if world is NUMPY else LARGE[::4]):
        for positions in choices(k, d):
            coded = encode_indices(ops, ops.upload(positions.astype(np.int64)), d, index)
            assert np.array_equal(np.array(ops.host(decode_indices(ops, coded, k, d, index))), positions), (k, d)


@pytest.mark.parametrize("index", CODINGS)
def test_sizes_are_what_is_declared_and_bounds_hold(index):
    """index_bytes is the exact size (for golomb, the largest possible), and max_index_bytes bounds it for every k up to `most`."""
    for k, d in TINY + LARGE:
        sizes = [len(encode_indices(NUMPY.ops, p.astype(np.int64), d, index)) for p in choices(k, d)]
        if index == "golomb":
            assert max(sizes) <= index_bytes(k, d, index)
        else:
            assert set(sizes) == {index_bytes(k, d, index)}
    for d in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 100, 257):
        for most in range(d + 1):
            assert max(index_bytes(k, d, index) for k in range(most + 1)) <= max_index_bytes(most, d, index), (most, d)
    for d in (1000, 65537, 1_000_000):
        for most in (1, 3, d // 1000, d // 100, d // 3, d - 1, d):
            ks = {1, 2, most // 2, most - 1, most, *(2**i for i in range(20)), *(2**i - 1 for i in range(1, 20))}
            assert max(index_bytes(k, d, index) for k in ks if 0 <= k <= most) <= max_index_bytes(most, d, index), (most, d)


def test_bits_a_position():
    """Bits per position at 1% of 10^6: golomb at most 8.3 (8.1 on average), elias_fano 8.6, block16 16, packed 20, bitmap 100; auto is the
    smaller of elias_fano and bitmap."""
    k, d = 10_000, 1_000_000
    positions = choices(k, d)[2].astype(np.int64)
    bits = {index: 8 * len(encode_indices(NUMPY.ops, positions, d, index)) / k for index in CODINGS}
    assert bits["golomb"] <= 8.3
    assert bits["elias_fano"] == bits["auto"] < 8.6
    assert bits["block16"] < 16.1 and bits["packed"] == 20 and bits["bitmap"] == 100
    for k, d in TINY + LARGE:
        assert index_bytes(k, d) == min(index_bytes(k, d, "elias_fano"), index_bytes(k, d, "bitmap"))


@pytest.mark.parametrize("index", CODINGS)
def test_corrupted_bytes(world, index):
    """Missing, added, random or changed bytes give valid positions or PayloadError, nothing else."""
    generator, ops = np.random.default_rng(7), world.ops
    raised = 0
    for k, d in [(1, 3), (2, 9), (5, 64), (7, 100), (60, 400), (30, 70_000), (399, 400)]:
        coded = np.array(encode_indices(NUMPY.ops, choices(k, d)[2].astype(np.int64), d, index))
        for turn in range(40 if world is NUMPY else 12):
            data = coded.copy()
            if turn % 4 == 0:
                data = generator.integers(0, 256, max(0, len(coded) + turn % 3 - 1)).astype(np.uint8)
            else:
                data[generator.integers(0, len(data), turn % 4)] ^= generator.integers(1, 256, turn % 4).astype(np.uint8)
            try:
                found = np.array(ops.host(decode_indices(ops, ops.upload(data), k, d, index)))
            except PayloadError:
                raised += 1
            else:
                assert len(found) == k and (np.diff(found) > 0).all() and found[0] >= 0 and found[-1] < d
    assert raised > 20
    with pytest.raises(PayloadError):
        decode_indices(ops, ops.upload(np.zeros(100, np.uint8)), 10, 9, index)


@pytest.mark.parametrize("index", CODINGS)
@pytest.mark.parametrize("text", ["topk(ratio=0.1, index={!r})", "threshold(threshold=1.5, index={!r})", "dgc(ratio=0.1, index={!r})"])
def test_compressors_decode_the_same_from_every_coding(text, index):
    """The coding changes the bytes, not the decoded values."""
    x = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    spec, info = TensorSpec("w", x.shape), StepInfo(0, 0, 1, 1)
    decoded = []
    for form in ("auto", index):
        part = grace_ext.grace(text.format(form) + " + none").compressor
        payload, _ = part.compress(NUMPY.ops, x, spec, info, {})
        assert sum(map(len, payload)) <= part.nbytes(spec)
        decoded.append(part.decompress(NUMPY.ops, payload, spec, info))
    assert decoded[0].any() and np.array_equal(*decoded)
