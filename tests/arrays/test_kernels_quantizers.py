"""Compiled quantizers and their plain forms give the same payloads, residuals, results and errors, bit for bit."""

from __future__ import annotations

import types
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grace_ext
from grace_ext.arrays import kernels
from grace_ext.arrays.compiled import host_ops
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.compressors.u8bit import EDGES, LOWEST, TABLE
from grace_ext.errors import PayloadError
from grace_ext.parts.ops import Feedback
from grace_ext.parts.tensor import StepInfo, TensorSpec

pytestmark = pytest.mark.skipif(not kernels.enabled(), reason="kernels are disabled, or numba is not installed")

PLAIN = NumpyOps()
SUITE = (
    "fp16", "bf16", "terngrad", "terngrad(clip=2.5)", "natural", "natural(bits=8)", "u8bit", "u8bit(block=1)", "u8bit(block=100)",
    "qsgd", "qsgd(bits=4)", "qsgd(bits=4, bucket=33)", "qsgd(bits=2, bucket=64)", "qsgd(bits=5)", "qsgd(levels=32767, bucket=3000)",
    "qsgd(levels=128, bucket=1)", "adaqs", "dqsgd(levels=1)",
)  # fmt: skip
#: Sizes around those of bytes, blocks (512), pieces of kernels (2048, 2560) and pieces of the operations that call them (65536).
SIZES = (1, 2, 3, 5, 7, 8, 9, 64, 511, 512, 513, 1536, 2047, 2048, 2049, 2560, 2561, 5123, 65536, 65541)
EXTREMES = np.array([0.0, -0.0, 1.4e-45, -1.4e-45, 1.2e-38, -5.96e-8, 6.1e-5, 65504, 65520, -1e9, 3.39e38, -3.4028235e38], np.float32)
FEEDBACKS = ((None, 1.0, 1.0), ("residual", 1.0, 1.0), ("residual", 0.9, 0.5))


@pytest.fixture(scope="module")
def ops():
    return host_ops(NumpyOps)


def compressor_of(text: str):
    return grace_ext.grace(f"{text} + none").compressor


def vectors(d: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([d, seed])
    normal = rng.standard_normal(d).astype(np.float32)
    return {
        "normal": normal,
        "zeros": np.zeros(d, np.float32),
        "small": normal * np.float32(1e-39),
        "wide range": (normal * 10.0 ** rng.uniform(-44, 37, d)).astype(np.float32),
        "extremes": rng.choice(EXTREMES, d),
        "largest": np.full(d, np.finfo(np.float32).max, np.float32) * rng.choice([-1, 1], d).astype(np.float32),
    }


def info_of(rank: int = 0, size: int = 3) -> StepInfo:
    return StepInfo(step=4, rank=rank, size=size, divisor=size)


def same(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def plain_form(compressor, grad, residual, beta, gamma, spec, state):
    """Returns (payload, residual or None), computed by plain operations in the same order as memory 'residual'."""
    x = grad
    if residual is not None:
        x = (residual if beta == 1 else residual * beta) + (grad if gamma == 1 else grad * gamma)
    payload, _ = compressor.compress(PLAIN, x, spec, info_of(), state)
    if residual is None:
        return payload, None
    return payload, x - compressor.decompress(PLAIN, payload, spec, info_of())


def check_encoding(ops, text: str, grad: np.ndarray, residual: np.ndarray) -> None:
    compressor, spec = compressor_of(text), TensorSpec("w", grad.shape)
    state = compressor.init(PLAIN, spec, info_of())
    for kept, beta, gamma in FEEDBACKS:
        kept = kept and residual
        grad.flags.writeable = False  # as the memory of a framework may be
        with np.errstate(all="ignore"):
            wanted, unsent = plain_form(compressor, grad, kept, beta, gamma, spec, state)
            done = compressor.fused(ops, grad, Feedback(kept, beta, gamma), spec, info_of(), state)
        assert all(same(a, b) for a, b in zip(done.payload, wanted, strict=True)), (text, len(grad), beta)
        assert (done.unsent is None) == (unsent is None) and (unsent is None or same(done.unsent, unsent)), (text, len(grad), beta)
        if kept is None:
            payload, _ = compressor.compress(ops, grad, spec, info_of(), state)
            assert all(same(a, b) for a, b in zip(payload, wanted, strict=True))


def finite_sum(residual: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Returns the residual, with zeros where it would make the sum overflow."""
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(residual + grad), residual, np.float32(0))


@pytest.mark.parametrize("text", SUITE)
@pytest.mark.parametrize("d", SIZES)
def test_encoding(ops, text, d):
    """The one-pass payload and residual are those of the three separate operations, without and with a residual."""
    residuals = list(vectors(d, seed=1).values())
    for place, grad in enumerate(vectors(d).values()):
        check_encoding(ops, text, grad, finite_sum(residuals[place - 1], grad))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_encoding_of_any_vector(data):
    """The same holds for values that hypothesis generates."""
    text, size = data.draw(st.sampled_from(SUITE)), data.draw(st.integers(1, 40))
    floats = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=size, max_size=size)
    grad, residual = (np.array(data.draw(floats), np.float32) for _ in range(2))
    check_encoding(host_ops(NumpyOps), text, grad, finite_sum(residual, grad))


@pytest.mark.parametrize("text", SUITE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left_to_the_plain_form(ops, text, bad):
    """`fused` returns None if any element is not finite, with and without a residual, or if only the sum overflows."""
    compressor, spec = compressor_of(text), TensorSpec("w", (70_001,))
    state = compressor.init(PLAIN, spec, info_of())
    for place in (0, 5, 66_000, 70_000):
        grad = np.ones(spec.size, np.float32)
        grad[place] = bad
        for residual in (None, np.ones(spec.size, np.float32)):
            assert compressor.fused(ops, grad, Feedback(residual), spec, info_of(), state) is None
    huge = np.full(spec.size, 3e38, np.float32)
    assert compressor.fused(ops, huge, Feedback(huge), spec, info_of(), state) is None


def payloads_of(compressor, spec, kind: str, ranks: int = 3) -> list:
    state = compressor.init(PLAIN, spec, info_of())
    with np.errstate(all="ignore"):
        return [compressor.compress(PLAIN, vectors(spec.size, seed=rank)[kind], spec, info_of(rank), state)[0] for rank in range(ranks)]


@pytest.mark.parametrize("text", SUITE)
@pytest.mark.parametrize("d", SIZES)
def test_combine(ops, text, d):
    """The mean of three ranks, and of one, is the same in a new array and in a given one, and from payloads at any address."""
    compressor, spec = compressor_of(text), TensorSpec("w", (d,))
    for kind in vectors(1):
        payloads = payloads_of(compressor, spec, kind)
        shifted = [[np.concatenate([np.zeros(3, np.uint8), piece])[3:] for piece in payload] for payload in payloads]
        for sent in (payloads, payloads[:1]):
            info = info_of(size=len(sent))
            with np.errstate(all="ignore"):
                wanted = compressor.combine(PLAIN, sent, spec, info)
                assert same(compressor.combine(ops, sent, spec, info), wanted), kind
                assert same(compressor.combine(ops, shifted[: len(sent)], spec, info, np.full(d, np.nan, np.float32)), wanted), kind


def test_every_compiled_form_is_used(ops):
    """Every compressor of SUITE has a compiled form, so that no test here compares the plain form with itself."""
    spec = TensorSpec("w", (100,))
    for text in SUITE:
        compressor = compressor_of(text)
        payloads = payloads_of(compressor, spec, "normal")
        with mock.patch.object(type(compressor), "decompress", side_effect=AssertionError(text)):
            compressor.combine(ops, payloads, spec, info_of(size=len(payloads)))


def with_byte(at: int, value: int):
    return lambda piece: np.concatenate([piece[:at], np.array([value], np.uint8), piece[at + 1 :]])


def floats(*values: float):
    return lambda piece: np.array(values, "<f4").view(np.uint8)


# (compressor, field, function that damages the field)
BAD = [
    ("fp16", 0, with_byte(151, 0x7C)),
    ("bf16", 0, lambda piece: np.concatenate([piece[:-2], np.array([0xC0, 0x7F], np.uint8)])),
    ("terngrad", 1, with_byte(19, 243)),
    ("terngrad", 0, floats(np.nan)),
    ("natural", 0, with_byte(77, 255)),
    ("u8bit", 0, floats(-1.0)),
    ("qsgd(levels=100)", 1, with_byte(99, 101)),
    ("qsgd(levels=5)", 1, lambda piece: piece * 0 + 255),
    ("qsgd", 0, floats(np.inf)),
    ("adaqs", 0, lambda piece: np.array([200, 0], np.uint8)),
    ("dqsgd(levels=5)", 2, lambda piece: piece * 0 + 255),
]


@pytest.mark.parametrize(("text", "field", "change"), BAD, ids=[f"{b[0]}-{place}" for place, b in enumerate(BAD)])
def test_bad_payloads(ops, text, field, change):
    """A bad payload of any rank gives the same error as the plain form, and the error names the rank."""
    compressor, spec = compressor_of(text), TensorSpec("w", (100,))
    for rank in range(3):
        payloads = [list(payload) for payload in payloads_of(compressor, spec, "normal")]
        payloads[rank][field] = change(payloads[rank][field])
        said = []
        for one in (PLAIN, ops):
            with np.errstate(all="ignore"), pytest.raises(PayloadError) as caught:
                compressor.combine(one, payloads, spec, info_of())
            assert caught.value.rank == rank
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_a_norm_that_overflows(ops):
    """For some s, the largest norm times s / s overflows float32; then the payload is valid or not depending on its levels."""
    compressor, spec = compressor_of("qsgd(levels=7)"), TensorSpec("w", (4,))
    largest = np.array([np.finfo(np.float32).max]).astype("<f4").view(np.uint8)
    for codes in ([1, 2, 3, 4], [1, 7, 3, 15]):
        payload = (largest, PLAIN.pack(np.array(codes), 4))
        outcomes = []
        for one in (PLAIN, ops):
            try:
                with np.errstate(over="ignore"):
                    outcomes.append(compressor.combine(one, [payload], spec, info_of(size=1)).tobytes())
            except PayloadError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(ops, dtype):
    """Conversions agree both ways for every 16-bit value, its neighbours in float32, the midpoints between values, Inf and NaN."""
    every = PLAIN.from_bytes(np.arange(2**16, dtype=np.uint16).view(np.uint8), dtype)
    assert same(np.isnan(ops.from_bytes(np.arange(2**16, dtype=np.uint16).view(np.uint8), dtype)), np.isnan(every))
    numbers = np.sort(every[np.isfinite(every)])
    assert same(ops.from_bytes(PLAIN.to_bytes(every[~np.isnan(every)], dtype), dtype), every[~np.isnan(every)])
    with np.errstate(over="ignore"):
        middle = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    tried = np.concatenate([np.nextafter(v, w) for v in (numbers, middle) for w in (v, np.float32(-np.inf), np.float32(np.inf))])
    tried = np.concatenate([tried, EXTREMES, np.array([np.inf, -np.inf, np.nan], np.float32)])
    assert same(ops.to_bytes(tried, dtype), PLAIN.to_bytes(tried, dtype))


def test_without_conversions_of_the_processor(ops):
    """Without conversion instructions, fp16 and bf16 use the plain form."""
    bare = host_ops(NumpyOps)
    bare.kernels = types.SimpleNamespace(**{**vars(ops.kernels), "narrow": None})
    x = vectors(100)["normal"]
    for dtype in ("float16", "bfloat16"):
        assert same(bare.to_bytes(x, dtype), PLAIN.to_bytes(x, dtype))
        assert same(bare.from_bytes(PLAIN.to_bytes(x, dtype), dtype), PLAIN.from_bytes(PLAIN.to_bytes(x, dtype), dtype))
    for text in ("fp16", "bf16"):
        compressor, spec = compressor_of(text), TensorSpec("w", (100,))
        assert compressor.fused(bare, x, Feedback(None), spec, info_of(), {}) is None
        payloads = payloads_of(compressor, spec, "normal")
        assert same(compressor.combine(bare, payloads, spec, info_of()), compressor.combine(PLAIN, payloads, spec, info_of()))


def test_the_table_of_u8bit():
    """The table gives the number of edges <= x, for x at and beside every edge, at the ends of every entry, and below the first edge."""
    bits = EDGES.view(np.uint32).astype(np.int64)
    ends = int(LOWEST) + 2**16 * np.arange(len(TABLE))
    tried = np.concatenate([bits - 1, bits, bits + 1, ends, ends[:-1] + 2**16 - 1, [0, 1, int(LOWEST) - 1, 0x3F800000]])
    b = np.maximum(tried, int(LOWEST)) - int(LOWEST)
    found = (TABLE[b >> 16].astype(np.int64) + b % 2**16) >> 16
    assert np.array_equal(found, np.searchsorted(EDGES, tried.astype(np.uint32).view(np.float32), side="right"))
