"""The quantizers: errors of the reference implementations, bits per element, integer sums, pipelines, and invalid payloads."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError, PayloadError, UnsupportedError
from grace_ext.exchange.message import HEADER
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, tapped

from ..oracles.test_oracles import VECTOR
from ..oracles.test_oracles_quantizers import code_book, normal, private_words

# --- errors of the reference implementations -----------------------------------------------------------------------------


def alone(text: str, x, step: int = 0) -> np.ndarray:
    """Returns C(x) on one rank, flat."""
    compressor, ops = grace_ext.grace(f"{text} + none").compressor, NUMPY.ops
    x = np.asarray(x, np.float32)
    spec, info = TensorSpec("w", x.shape), StepInfo(step=step, rank=0, size=1, divisor=1)
    payload, _ = compressor.compress(ops, x, spec, info, compressor.init(ops, spec, info))
    return compressor.decompress(ops, payload, spec, info)


def test_onebit_of_the_published_example():
    """Bug 1: (-1, -3, 2, 4) decodes to (-2, -2, 3, 3), not to (760, 760, 765, 765)."""
    assert alone("onebit", [-1, -3, 2, 4]).tolist() == [-2, -2, 3, 3]
    assert alone("onebit", [1, 3]).tolist() == [2, 2] and alone("onebit", [-1, -3]).tolist() == [-2, -2]
    assert alone("onebit", [0, -0.0, 5, -7]).tolist() == pytest.approx([5 / 3, 5 / 3, 5 / 3, -7])


def test_onebit_is_a_projection():
    """C(x) is orthogonal to x - C(x), and C(C(x)) = C(x)."""
    x = inputs.normal(0, 0, shapes={"w": (500,)})["w"] + np.float32(0.3)
    sent = alone("onebit", x)
    assert abs(np.dot(sent.astype(np.float64), x - sent.astype(np.float64))) < 1e-4
    assert np.allclose(alone("onebit", sent), sent, rtol=1e-6)


def test_u8bit_keeps_the_largest_and_rounds_to_the_nearest():
    """Bug 17: the largest element decodes exactly, values below the smallest code become 0, and rounding is to nearest, not down."""
    for scale in (1.0, -3.7, 1e-30, 3.4e38, 1.4e-45):
        x = np.float32(scale) * np.array([1, 0.99, 0.5, -0.3, 1e-3, 0], np.float32)
        out = alone("u8bit", x)
        assert out[0] == x[0] and out[-1] == 0
    x = np.concatenate([[1.0], np.linspace(0.1, 0.99, 1000)])
    error = alone("u8bit", x) - x
    assert np.abs(error).max() <= 0.9 / 64 / 2 + 0.9 / 64 / 2 * 0.5 + 1e-6 and abs(error.mean()) < 5e-4
    assert alone("u8bit", [1, 1e-9, -2.7e-7, 2.8e-7]).tolist()[1:3] == [0, 0] and alone("u8bit", [1, 2.8e-7])[1] > 0
    assert len(code_book()) == 128 and sorted(code_book()) == code_book()


def test_inceptionn_bounds_are_binary():
    """Bug 18: the bound is 2^-(E+1), with E a binary exponent, in every class; values from 2^-10 to 2^-7 keep their leading bit."""
    for e in (7, 10, 15):
        x = np.concatenate([sign * np.array([m * 2.0**f for f in range(-18, 3) for m in (1, 1.25, 1.5, 1.999)]) for sign in (1, -1)])
        x = np.concatenate([x, [1 - 2.0**-24, 127.4 / 2**e, 127.6 / 2**e]])
        out = alone(f"inceptionn(bound_exponent={e})", x)
        assert np.abs(out - x).max() <= 2.0 ** -(e + 1)
    powers = [2.0**-10, 2.0**-9, 2.0**-8, 2.0**-7, -(2.0**-7)]
    assert alone("inceptionn", powers).tolist() == powers
    assert alone("inceptionn", [2.0**-11 * 0.99, 3e38, -1.5]).tolist() == [0, np.float32(3e38), -1.5]


def test_inceptionn_sends_the_bits_of_its_classes(world):
    """It sends 2 d + 8 n8 + 16 n16 + 32 n32 bits, and 4 bytes for the count."""
    x = np.array([0, 1e-9, 1e-2, -0.1, 0.5, -0.9, 2, 300], np.float32)
    cluster = world.cluster(grace_ext.grace("inceptionn + none"), 1)
    world.step(cluster, [{"w": x}])
    assert cluster.wire_bytes == [HEADER.size + 2 + 4 + 2 * 1 + 2 * 2 + 2 * 4]


def test_natural_probabilities_are_exact():
    """Bug 19: it rounds up with probability exactly m / 2^23 (if m > u, 0 <= u < 2^23); powers of two stay; 9 bits clip nothing."""
    x = np.concatenate([2.0 ** np.arange(-126, 128), [2.0**-149, 3.4e38]])
    out = alone("natural", x)
    assert np.array_equal(out[:-2], x[:-2]) and out[-1] == 2.0**127 and out[-2] in (0, 2.0**-126)
    words = private_words("natural", 0, 0, 1)(256) >> 9
    exactly = np.float32(1) + words.astype(np.float32) * np.float32(2.0**-23)  # m = u rounds down
    assert (alone("natural", exactly) == 1).all()
    above = words < 2**23 - 1
    assert (alone("natural", exactly + np.float32(2.0**-23))[above] == 2).all()  # m = u + 1 rounds up
    window = 2.0 ** np.array([-109, -108, 18, 20])
    assert alone("natural(bits=8)", window).tolist() == [0, 2.0**-108, 2.0**18, 2.0**18]
    assert alone("natural(bits=8)", -window).tolist() == [0, -(2.0**-108), -(2.0**18), -(2.0**18)]


def test_levels_above_127_are_exact():
    """Bug 20: a zero bucket decodes to zeros, and levels of more than 11 bits decode exactly."""
    x = np.zeros(1024, np.float32)
    x[:3] = 3, -4, 0
    out = alone("dqsgd(levels=32767, max_levels=32767)", x)
    assert not out[512:].any() and np.abs(out[:3] - x[:3]).max() <= 5 / 32767 * 1.01
    out = alone("adaqs(levels=4099, max_levels=4099)", [4099, 0.0, 0])
    assert out.tolist() == [4099, 0, 0]


def test_signs_and_trits_are_packed():
    """Bug 21: a sign takes one bit and a trit 1.6 bits, not a byte."""
    sizes = {text: grace_ext.grace(f"{text} + none").nbytes(TensorSpec("w", (100_000,))) for text in ("onebit", "terngrad")}
    assert sizes == {"onebit": 12_500 + 8, "terngrad": 20_000 + 4}


TABLE = {
    "onebit": 1 + 64e-6,
    "terngrad": 1.6,
    "qsgd": 8.06,
    "qsgd(bits=4)": 4.06,
    "natural": 9,
    "natural(bits=8)": 8,
    "u8bit": 8,
    "sketch": 6 + 32 * 64e-6,
    "scaled_int": 32,
    "scaled_int(width=16)": 16,
    "scaled_int(width=8)": 8,
    "vqsgd": (100 * 21 + 32) * 1e-6,
    "adaqs": 4.06,
    "dqsgd": 8.06,
}


@pytest.mark.parametrize("text", [*TABLE, "inceptionn"])
def test_bits_an_element(text):
    """A million Gaussian elements, header included, take the table's bits within 5% (without the header for vqsgd, where it is 12%)."""
    x = inputs.normal(0, 0, shapes={"w": (1000, 1000)})["w"]
    wanted = TABLE.get(text)
    if wanted is None:
        n8 = (np.abs(x) < 127.5 / 1024).sum() - (np.abs(x) <= 0.5 / 1024).sum()
        n32 = (np.abs(x) >= 1).sum()
        wanted = (2e6 + 8 * n8 + 32 * n32 + 16 * (1e6 - n8 - n32 - (np.abs(x) <= 0.5 / 1024).sum())) / 1e6
    cluster = NUMPY.cluster(grace_ext.grace(f"{text} + none"), 1)
    NUMPY.step(cluster, [{"w": x}])
    bits = 8 * (cluster.wire_bytes[0] - (HEADER.size if text == "vqsgd" else 0)) / 1e6
    assert wanted * 0.999 <= bits <= wanted * 1.05


# --- integer sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "n"), [(8, 127), (8, 3), (8, 5), (16, 7), (32, 3)])
def test_integer_sums_cannot_overflow(width, n):
    """If all ranks send the agreed maximum, with either sign, and n does not divide the range, sums stay within the range and are exact."""
    cluster = NUMPY.cluster(grace_ext.grace(f"scaled_int(width={width}) + none"), n)
    limit = 2 ** (width - 1) - 1
    for largest in (1.0, 0.999, 3e38, 1e-45, 127.0, 42.4):
        x = np.float32(largest) * np.array([1, -1, 0.5, 0, 0.3], np.float32).repeat(20)
        with tapped() as seen:
            out = NUMPY.step(cluster, [{"w": x}] * n)["w"]
        assert [(s.kind, s.dtype) for s in seen] == [("allgather", "uint8"), ("allreduce", f"int{width}")]
        # A LocalCluster sums int64 arrays internally; the last element is the flag.
        sent = np.array([np.frombuffer(buffer, np.int64) for buffer in seen[1].buffers])
        assert limit // n / 2 - 0.5 <= np.abs(sent).max() <= limit // n and np.abs(sent.sum(axis=0)).max() <= limit
        assert np.abs(out / np.float64(x[0]) - x / np.float64(x[0])).max() <= 1.01 / max(limit // n, 1)


def test_integer_sums_refuse_what_does_not_fit():
    """128 ranks cannot add up signed bytes without overflow."""
    cluster = NUMPY.cluster(grace_ext.grace("scaled_int(width=8) + none"), 128)
    with pytest.raises(UnsupportedError, match="the sum of 128 ranks does not fit 8 bits"):
        NUMPY.step(cluster, [{"w": np.ones(100, np.float32)}] * 128)


def test_integer_sums_do_not_depend_on_the_order(world):
    """The same gradients in another order of ranks give the same bits; float sums would not."""
    given = [10.0**r * x for r, x in enumerate(normal(4, 0, VECTOR))]
    outs = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        cluster = world.cluster(grace_ext.grace("scaled_int + none"), 4)
        outs.append(world.step(cluster, [{"w": given[r].astype(np.float32)} for r in order])["w"].tobytes())
    assert len(set(outs)) == 1


def test_integer_sums_of_half_precision_are_sent_as_they_are():
    """16-bit gradients are sent uncompressed, because 32-bit integers would double them; 8-bit integers halve them."""
    g = grace_ext.grace("scaled_int + none")
    assert g.nbytes(TensorSpec("w", (1000,), "bfloat16")) == 2000 and g.nbytes(TensorSpec("w", (1000,))) == 4004
    assert grace_ext.grace("scaled_int(width=8) + none").nbytes(TensorSpec("w", (1000,), "float16")) == 1004


def test_a_zero_block_beside_others(world):
    """Each block has its own scale; a rank with zeros adds nothing."""
    x = np.repeat(np.array([0, 1, 1e-6], np.float32), 50)
    cluster = world.cluster(grace_ext.grace("scaled_int(width=8, block=50) + none"), 2)
    out = world.step(cluster, [{"w": x}, {"w": 0 * x}])["w"]
    assert not out[:50].any() and np.allclose(out[50:], x[50:] / 2, rtol=0.02)


# --- as the second stage of a pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["onebit", "terngrad", "natural", "u8bit", "inceptionn", "sketch(quantiles=4)", "scaled_int(width=8)"])
def test_pipeline(world, codec):
    """A pipeline codes the k selected values as the codec alone would; with an unbiased codec, the result is divided by 1 + omega."""
    x = normal(1, 0, VECTOR)[0]
    out = world.step(world.cluster(grace_ext.grace(f"topk(ratio=0.5) > {codec} + none"), 1), [{"w": x}])["w"]
    kept = np.sort(np.argsort(-np.abs(x), kind="stable")[:97])
    part = grace_ext.grace(f"{codec} + none").compressor
    wanted = alone(codec, x[kept]) / (1 + ((part.unbiased and part.omega(97)) or 0))
    assert np.allclose(out[kept], wanted, rtol=1e-6) and not np.delete(out, kept).any()


@pytest.mark.parametrize("codec", ["adaqs", "dqsgd"])
def test_pipeline_refuses_codecs_with_a_state(codec):
    with pytest.raises(IncompatiblePartsError, match="second stage"):
        grace_ext.grace(f"topk > {codec} + residual")


# --- what a peer may send ------------------------------------------------------------------------------------------------


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


# (compressor, index of the replaced field, its new bytes, text of the error), for 10 elements
BROKEN = [
    ("onebit", 0, floats(np.inf), "a mean that is not finite"),
    ("onebit", 1, floats(np.nan), "a mean that is not finite"),
    ("terngrad", 0, floats(-1), "a scale that is negative"),
    ("terngrad", 1, bytes([242, 243]), "a byte above 242"),
    ("natural", 0, bytes([0, 255] * 5), "an exponent of Inf"),
    ("u8bit(block=5)", 0, floats(1, np.inf), "a scale that is negative or not finite"),
    ("inceptionn", 0, bytes([0xFF, 0, 0]), "0 bytes of values, but its tags stand for 16"),
    ("inceptionn", 1, bytes(3), "3 bytes of values, but its tags stand for 0"),
    ("sketch(quantiles=5)", 0, floats(0, 1, 2, np.nan, 4), "a mean that is not finite"),
    ("sketch(quantiles=5)", 1, bytes([5, 0, 0, 0]), "a code above 4"),
    ("adaqs", 0, bytes([0, 0]), "has 0 levels"),
    ("adaqs", 0, bytes([128, 0]), "has 128 levels, at most 127"),
    ("adaqs", 0, bytes([127, 0]), "5 bytes of codes, but 127 levels take 10"),
    ("adaqs", 1, floats(-2), "a norm that is negative"),
    ("dqsgd(levels=5)", 2, bytes([0xFF] * 5), "a level above 5"),
    ("scaled_int(width=8)", 0, floats(-1), "a maximum that is negative"),
    ("scaled_int(width=8)", 1, bytes([128] * 10), "an integer below -127"),
    ("vqsgd(repeats=3)", 0, floats(np.nan), "a norm that is negative or not finite"),
    ("vqsgd(repeats=3)", 1, bytes([20, 0]), "corner 20 of 20"),
]


@pytest.mark.parametrize(("text", "field", "data", "words"), BROKEN, ids=[f"{b[0]}-{b[3]}" for b in BROKEN])
def test_broken_payloads(world, text, field, data, words):
    """Any invalid code, level, scale or count raises PayloadError."""
    compressor, ops = grace_ext.grace(f"{text} + none").compressor, world.ops
    spec, info = TensorSpec("w", (10,)), StepInfo(step=0, rank=0, size=1, divisor=1)
    payload = list(compressor.compress(ops, ops.zeros(10), spec, info, compressor.init(ops, spec, info))[0])
    assert not np.array(ops.host(compressor.decompress(ops, payload, spec, info))).any()
    payload[field] = ops.upload(np.frombuffer(data, np.uint8).copy())
    with pytest.raises(PayloadError, match=words):
        compressor.decompress(ops, payload, spec, info)


def test_a_raw_value_that_is_not_finite(world):
    """inceptionn sends large values as they are, but a NaN among them raises."""
    ops, compressor, spec = world.ops, grace_ext.grace("inceptionn + none").compressor, TensorSpec("w", (1,))
    payload = [ops.upload(np.array([3], np.uint8)), ops.upload(np.frombuffer(floats(np.nan), np.uint8).copy())]
    with pytest.raises(PayloadError, match="not finite"):
        compressor.decompress(ops, payload, spec, StepInfo(step=0, rank=0, size=1, divisor=1))


def test_a_broken_maximum_names_its_rank(world):
    """The first round of scaled_int is checked like any payload."""

    def change(collectives, ops):
        if collectives[0].kind != "allgather":
            return collectives
        array = np.array(ops.host(collectives[1].array))
        array[-4:] = np.frombuffer(floats(np.nan), np.uint8)
        return [collectives[0], collectives[1]._replace(array=ops.upload(array))]

    cluster = world.cluster(grace_ext.grace("scaled_int(width=16) + none"), 2)
    with tapped(change), pytest.raises(PayloadError, match="a maximum that is negative or not finite") as caught:
        world.step(cluster, [{"w": x} for x in normal(2, 0, VECTOR)])
    assert caught.value.rank == 1 and caught.value.parameter == "w"
