"""A peer's message is checked before use. Anything wrong raises a PayloadError that names the rank and, if known, the parameter."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grace_ext
from grace_ext.compressors.forms.positions import decode_indices, encode_indices, index_bytes, max_index_bytes
from grace_ext.errors import PayloadError
from grace_ext.exchange.message import HEADER
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, tapped

SHAPES = {"first": (600,), "second": (24, 18)}
SENDER = 1
# A bucket holds its parameters last first, so the message is header | second | first.


def tampering(change, kind: str = "allgather"):
    """Replaces the message of rank SENDER by `change(bytearray) -> bytes` before all ranks receive it."""

    def apply(collectives, ops):
        if collectives[0].kind != kind:
            return collectives
        mine = collectives[SENDER]
        data = bytes(change(bytearray(np.array(ops.host(mine.array)).tobytes())))
        array = ops.upload(np.frombuffer(data, np.uint8).copy())
        return [*collectives[:SENDER], mine._replace(array=array), *collectives[SENDER + 1 :]]

    return tapped(apply)


def rejected(world, spec: str, change, *, parameter: str | None = None, match: str | None = None, kind: str = "") -> None:
    """Asserts that the step raises and names the sender, and that the next step works as if the bad one had not happened."""
    g = grace_ext.grace(spec)
    cluster, clean = world.cluster(g, 3), world.cluster(g, 3)
    steps = [inputs.ranks(3, step, shapes=SHAPES) for step in range(2)]
    world.step(cluster, steps[0])
    world.step(clean, steps[0])
    with tampering(change, kind or g.communicator.name), np.errstate(all="ignore"), pytest.raises(PayloadError, match=match) as caught:
        world.step(cluster, steps[1])
    assert caught.value.rank == SENDER and f"rank {SENDER}" in str(caught.value)
    assert caught.value.parameter == parameter
    if parameter:
        assert repr(parameter) in str(caught.value)
    assert same_bits(world.step(cluster, steps[1]), world.step(clean, steps[1]))


def written(at: int, form: str, *values):
    """Returns a change that writes values at a position."""

    def change(data: bytearray) -> bytearray:
        struct.pack_into(form, data, at, *values)
        return data

    return change


HEADERS = {
    "empty": (lambda d: b"", "shorter"),
    "cut inside the header": (lambda d: d[:23], "shorter"),
    "cut in the middle": (lambda d: d[: len(d) // 2], "truncated"),
    "one byte less": (lambda d: d[:-1], "truncated"),
    "one byte more": (lambda d: d + b"\0", "truncated or too long"),
    "magic": (written(0, "<2s", b"XG"), "start"),
    "version": (written(2, "B", 77), "version 77"),
    "flags": (written(3, "B", 0x82), "flags"),
    "step": (written(4, "<I", 9), "step 9"),
    "digest": (lambda d: d[:8] + bytes([d[8] ^ 1]) + d[9:], "another spec"),
    "length": (written(16, "<Q", 2**63), "truncated"),
}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("spec", ["topk(ratio=0.1) + residual @ allgather", "qsgd + none @ broadcast"])
def test_headers(world, spec, kind):
    """Damage to any header field, or to the length, is found."""
    change, match = HEADERS[kind]
    rejected(world, spec, change, match=match)


def fields_of(text: str, name: str):
    """Returns {field: (offset in the message, bytes)} for a parameter's fields, which must all have fixed sizes."""
    compressor, at, found = grace_ext.grace(f"{text} + none").compressor, HEADER.size, {}
    for parameter in ("second", "first"):
        for field in compressor.fields(TensorSpec(parameter, SHAPES[parameter])):
            assert not field.variable
            if parameter == name:
                found[field.name] = at, field.max_bytes
            at += field.max_bytes
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("text", ["topk(ratio=0.1)", "topk(ratio=0.4)"])
def test_topk_positions(world, text, name):
    """Too many, too few or out-of-range positions are found, in the Elias-Fano form and in the bitmap, for either parameter."""
    at, size = fields_of(text, name)["positions"]

    def fill(value):
        return lambda data: data[:at] + bytes([value]) * size + data[at + size :]

    rejected(world, f"{text} + residual", fill(0xFF), parameter=name)
    rejected(world, f"{text} + residual", fill(0), parameter=name)
    last = at + size - 1
    rejected(world, f"{text} + residual", lambda d: d[:last] + bytes([d[last] ^ 0x01]) + d[last + 1 :], parameter=name)


def test_signsgd_vote_flag(world):
    """Any flag other than 0 and 1 is found."""
    at, _ = fields_of("signsgd", "second")["votes"]
    for value in (2, 255):
        rejected(world, "signsgd + residual", written(at, "B", value), parameter="second", match=str(value))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales(world, value):
    """A negative or non-finite scale or norm is found."""
    for text, field in (("efsignsgd(block=64)", "scales"), ("qsgd(bits=4)", "norms")):
        at, size = fields_of(text, "first")[field]
        rejected(world, f"{text} + none", written(at + size - 4, "<f", value), parameter="first", match="negative or not finite")


def test_qsgd_levels(world):
    """A code above the highest level, which would decode to more than the norm, is found."""
    at, _ = fields_of("qsgd(levels=100)", "second")["codes"]
    rejected(world, "qsgd(levels=100) + none", written(at, "B", 0x7F), parameter="second", match="100")


@pytest.mark.parametrize("spec", ["topk(ratio=0.1) + residual", "fp16 + none", "efsignsgd + residual", "onebit + none"])
def test_shards_there_and_back(world, spec, small_shards):
    """In both directions of reduce_scatter, a bad shard is found and its parameter named; no NaN passes without a flag."""

    def all_ones(data):  # overwrites the bodies of all messages that this rank sends
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at + 16)
            data[at + HEADER.size : at + HEADER.size + length] = b"\xff" * length
            at += HEADER.size + length
        return data

    for kind in ("alltoall", "allgather"):
        rejected(world, f"{spec} @ reduce_scatter", all_ones, parameter="second", kind=kind)


THRESHOLD = "threshold(threshold=1.5) + residual"


def test_threshold_counts(world):
    """Counts above the number of elements or of bytes are found, and positions that do not match the values."""
    start = HEADER.size
    rejected(world, THRESHOLD, written(start, "<I", 2**32 - 1), parameter="second", match="at most 432")
    rejected(world, THRESHOLD, written(start, "<I", 433), parameter="second", match="at most 432")
    rejected(world, THRESHOLD, written(start, "<I", 432), parameter="second")
    rejected(world, THRESHOLD, written(start, "<I", 0), parameter="second")

    def positions_missing(data):
        (count,) = struct.unpack_from("<I", data, start)
        at = start + 4 + 4 * count
        (size,) = struct.unpack_from("<I", data, at)
        data = data[:at] + struct.pack("<I", 0) + data[at + 4 + size :]
        return data[:16] + struct.pack("<Q", len(data) - HEADER.size) + data[HEADER.size :]

    rejected(world, THRESHOLD, positions_missing, parameter="second", match="bytes of indices")
    rejected(world, THRESHOLD, lambda d: d[:16] + struct.pack("<Q", 2) + d[24:26], parameter="second", match="ends before the count")
    rejected(world, THRESHOLD, lambda d: d[:16] + struct.pack("<Q", len(d) - 21) + d[24:] + b"\0\0\0", match="3 bytes that belong to no")


def test_every_rank_rejects(world):
    """All ranks check the same bytes, so a rank also rejects its own bad message."""
    cluster = world.cluster(grace_ext.grace("topk + residual"), 1)
    with tapped(lambda cs, ops: [cs[0]._replace(array=cs[0].array[:-1])]), pytest.raises(PayloadError) as caught:
        world.step(cluster, inputs.ranks(1, 0, shapes=SHAPES))
    assert caught.value.rank == 0



def test_index_coding_round_trips_and_is_never_larger_than_a_bitmap(world):
    """For every k of small d, and for large d, the coded size is as declared and positions are decoded exactly."""
    ops, rng = world.ops, np.random.default_rng(0)
    cases = [(k, d) for d in (1, 2, 3, 8, 9, 31, 64) for k in range(d + 1)] + [(k, 100_000) for k in (1, 7, 1000, 49_999, 99_999)]
    for k, d in cases:
        for positions in (np.arange(k), np.arange(d - k, d), np.sort(rng.permutation(d)[:k])):
            coded = encode_indices(ops, ops.upload(positions.astype(np.int64)), d)
            assert len(coded) == index_bytes(k, d) <= max_index_bytes(k, d) <= max_index_bytes(d, d)
            assert np.array_equal(np.array(ops.host(decode_indices(ops, coded, k, d))), positions), (k, d)
    assert index_bytes(1000, 100_000) * 8 / 1000 < 8.7  # bits per position at 1%


def check_positions(coded: np.ndarray, k: int, d: int) -> None:
    """Asserts that decoding gives k distinct ascending positions below d, or raises PayloadError."""
    try:
        positions = decode_indices(NUMPY.ops, coded, k, d)
    except PayloadError:
        return
    assert len(positions) == k and (np.diff(positions) > 0).all() and (k == 0 or (positions[0] >= 0 and positions[-1] < d))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_bytes_decode_to_valid_positions_or_raise(data):
    """This holds for random bytes, and for valid codes with flipped bits."""
    d = data.draw(st.integers(1, 400))
    k = data.draw(st.integers(0, d))
    size = index_bytes(k, d)
    if data.draw(st.booleans()):
        size = max(0, size + data.draw(st.sampled_from([0, 0, 1, -1])))
        coded = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    else:
        positions = np.sort(np.random.default_rng(data.draw(st.integers(0, 99))).permutation(d)[:k])
        coded = np.array(encode_indices(NUMPY.ops, positions, d))
        for _ in range(data.draw(st.integers(1, 3)) if size else 0):
            coded[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_positions(coded, k, d)


@pytest.mark.parametrize(("k", "d"), [(1, 3), (2, 7), (5, 8), (1, 9), (1, 100), (2, 40), (2, 60), (3, 24)])
def test_every_code_of_one_or_two_bytes(k, d):
    """All short codes in both forms are decoded or rejected: set padding bits, and positions that are equal, descending, or exactly d."""
    size = index_bytes(k, d)
    assert size in (1, 2)
    for code in range(0, 256**size, 1 if size == 1 else 7):
        check_positions(np.frombuffer(code.to_bytes(size, "little"), np.uint8), k, d)
