"""Measured sizes of sparse compressors are as expected, and GRACE's bugs in sparse compressors do not occur."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import PayloadError
from grace_ext.exchange.message import HEADER
from grace_ext.parts import rng
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, tapped

SHAPE, SIZE = (1000, 1000), 1_000_000
INFO = StepInfo(step=0, rank=0, size=1, divisor=1)


def sent(text: str, x: np.ndarray, shape=None):
    """Returns (bytes on the wire, decoded values)."""
    part, spec = grace_ext.grace(f"{text} + none").compressor, TensorSpec("w", shape or x.shape)
    payload, _ = part.compress(NUMPY.ops, x.reshape(-1), spec, INFO, part.init(NUMPY.ops, spec, INFO))
    total = sum(len(piece) + 4 * field.variable for piece, field in zip(payload, part.fields(spec), strict=True))
    assert total <= part.nbytes(spec)
    return total, part.decompress(NUMPY.ops, payload, spec, INFO)


@pytest.fixture(scope="module")
def gaussian():
    return inputs.normal(0, 0, shapes={"w": SHAPE})["w"]


@pytest.mark.parametrize(
    "text,bits",
    [
        ("topk", 0.40),
        ("topk(index='golomb')", 0.40),
        ("global_topk", 0.40),
        ("randomk", 0.32),
        ("randblock", 0.32),
        ("topk(values='fp16')", 0.24),
        ("topk(ratio=0.001) > qsgd(bits=8)", 0.02),
        ("topk(ratio=0.001) > sign", 0.013),
        ("induced", 0.406 + 9),
    ],
)
def test_bits_an_element(gaussian, text, bits):
    """A 1000 x 1000 gradient takes the table's bits per element within 5%."""
    measured = 8 * sent(text, gaussian)[0] / SIZE
    assert measured == pytest.approx(bits, rel=0.05)


@pytest.mark.parametrize("text", ["dgc", "sidco", "sidco(distribution='pareto')"])
def test_estimated_thresholds(gaussian, text):
    """About 1% of the elements are sent, with 40.5 bits each: 0.40 bits per element if exactly 1% are sent."""
    nbytes, decoded = sent(text, gaussian)
    kept = np.count_nonzero(decoded)
    assert 0.8 * SIZE / 100 <= kept <= 1.3 * SIZE / 100
    assert 8 * nbytes / kept == pytest.approx(40.5, rel=0.02)


def test_signs_at_positions(gaussian):
    """adaq sends 0.096 bits per element (0.08 to 0.32 are possible), strom one bit and a position per sent element, wangni its formula."""
    assert 0.08 < 8 * sent("adaq", gaussian)[0] / SIZE < 0.1
    nbytes, decoded = sent("strom(threshold=2.5758)", gaussian)
    assert 8 * nbytes / np.count_nonzero(decoded) < 9.7
    nbytes, decoded = sent("wangni", gaussian)
    n = np.count_nonzero(decoded)
    assert abs(n - SIZE / 100) < 500 and 8 * (nbytes - 24) / n < 9.7
    heavy = gaussian.reshape(-1).copy()
    heavy[:3000] *= 1e4
    nbytes, decoded = sent("wangni", heavy)
    exact = np.count_nonzero(decoded == heavy)
    assert exact > 2500 and 8 * nbytes <= exact * (32 + 11) + (np.count_nonzero(decoded) - exact) * 10.4 + 8 * 24


def test_transforms(gaussian):
    """demo sends 0.31 bits per element, below the table's 0.36, because positions are coded together; atomo sends m (a + b) floats."""
    assert 8 * sent("demo", gaussian)[0] / SIZE == pytest.approx(0.31, rel=0.01)
    assert 8 * sent("demo(values='fp16', index='packed')", gaussian)[0] / SIZE < 0.47
    assert sent("demo", gaussian[:61, :997])[0] < 0.014 * 4 * 61 * 997  # a prime length is padded, not cut into tiles of one element
    nbytes, decoded = sent("atomo(rank=2)", gaussian[:50, :80])
    m = np.linalg.matrix_rank(decoded.reshape(50, 80).astype(float), tol=1e-3)
    assert nbytes == 8 + 4 * m * 130
    assert grace_ext.grace("atomo(rank=2) + none").compressor.mean_nbytes(TensorSpec("w", SHAPE)) == 8 + 4 * 2 * 2000


# --- bugs of GRACE, by their numbers in docs/porting-from-grace.md -----------------------------
def test_bug_9_a_sampled_threshold_of_zero(world):
    """Bug 9: GRACE's dgc sends all 100,000 elements of a tensor with 0.1% non-zeros, with 8-byte indices. Ours sends the non-zeros, and at
    most upper * k of them."""
    for nonzero in (0, 1, 100, 1000, 1200, 5000):
        x = np.zeros(100_000, np.float32)
        x[np.random.default_rng(0).permutation(x.size)[:nonzero]] = np.linspace(-1, 2, nonzero) + 0.001
        cluster = world.cluster(grace_ext.grace("dgc(ratio=0.01) + none"), 1)
        out = world.step(cluster, [{"w": x}])["w"]
        kept = np.count_nonzero(out)
        assert min(800, nonzero) <= kept <= min(1300, nonzero)
        assert np.abs(out).max() == np.abs(x).max() and cluster.wire_bytes[0] <= HEADER.size + 8 + max(1, kept) * 8


def test_dgc_keeps_the_largest_of_too_many(world):
    """Bug 36: the authors' code keeps the first k of them; here the largest are kept, wherever they are."""
    x = np.linspace(1, 2, 4000, dtype=np.float32)
    for upper in (1.0, 1.3):
        out = world.step(world.cluster(grace_ext.grace(f"dgc(ratio=0.05, upper={upper}, sample_ratio=0.01) + none"), 1), [{"w": x}])["w"]
        kept = np.flatnonzero(out)
        assert 160 <= kept.size <= 200 * upper and np.array_equal(kept, np.arange(4000 - kept.size, 4000))


@pytest.mark.parametrize("text", ["threshold(threshold=4)", "strom(threshold=4)", "sidco(ratio=0.3)", "dgc(ratio=0.3)", "adaq(ratio=0.3)"])
def test_bug_10_all_negative(world, text):
    """Bug 10: GRACE's threshold uses max, not max of magnitudes. Here -x selects the same as x; 7 of 10 reach the threshold."""
    x = -np.arange(1, 11, dtype=np.float32)
    out = [world.step(world.cluster(grace_ext.grace(f"{text} + none"), 1), [{"w": s * x}])["w"] for s in (1, -1)]
    assert np.array_equal(out[0], -out[1]) and (out[0] <= 0).all()
    assert "threshold=" not in text or np.count_nonzero(out[0]) == 7


def test_bug_11_without_replacement(world):
    """Bug 11: GRACE draws 300 positions of which 263 are different, and loses values. Here all are different."""
    x = np.ones(1000, np.float32)
    for text in ("randomk(ratio=0.3)", "randblock(ratio=0.3)"):
        out = world.step(world.cluster(grace_ext.grace(f"{text} + none"), 1), [{"w": x}])["w"]
        assert np.count_nonzero(out) == 300 and out.sum() == 300


def test_bug_12_names_do_not_collide(world):
    """Bug 12: GRACE's seed is the sum of the name's characters and a call counter, so anagrams, and other steps, share positions."""
    seen = set()
    for text in ("randomk(ratio=0.01)", "randblock(ratio=0.01)"):
        cluster = world.cluster(grace_ext.grace(f"{text} + none"), 2)
        for _ in range(3):
            given = {name: np.ones(5000, np.float32) for name in ("ab", "ba", "ac")}
            out = world.step(cluster, [given, dict(reversed(given.items()))])
            seen |= {tuple(np.flatnonzero(out[name])) for name in given}
            assert all(np.count_nonzero(out[name]) == 50 for name in given)  # both ranks draw the same, whatever their order of tensors
    assert len(seen) == 18


@pytest.mark.parametrize("text", ["topk", "threshold(threshold=2.5758)", "dgc", "sidco", "global_topk"])
def test_bug_21_positions_are_not_8_bytes(gaussian, text):
    """Bug 21: with int64 indices, GRACE sends 12 bytes per kept element; here it is 5.1."""
    nbytes, decoded = sent(text, gaussian)
    assert nbytes / np.count_nonzero(decoded) < 5.1


@pytest.mark.parametrize("text", ["dgc", "sidco", "global_topk", "adaq", "strom", "threshold", "wangni", "dgc > qsgd", "demo"])
def test_bug_25_a_payload_explains_itself(gaussian, text):
    """Bug 25: GRACE's dgc needs the sender's mask to decode. Here a new compressor on another rank decodes, and finds the positions."""
    x, spec = gaussian[:40, :50].reshape(-1), TensorSpec("w", (40, 50))
    part = grace_ext.grace(f"{text} + none").compressor
    payload, _ = part.compress(NUMPY.ops, x, spec, INFO, part.init(NUMPY.ops, spec, INFO))
    other, there = grace_ext.grace(f"{text} + none").compressor, StepInfo(step=0, rank=5, size=8, divisor=8)
    wire = [np.frombuffer(piece.tobytes(), np.uint8) for piece in payload]
    decoded = other.decompress(NUMPY.ops, wire, spec, there)
    assert np.array_equal(decoded, part.decompress(NUMPY.ops, payload, spec, INFO)) and decoded.any()
    if other.selects:
        assert set(np.flatnonzero(decoded)) <= set(other.positions(NUMPY.ops, wire, spec, there).tolist())


# --- invalid payloads ---------------------------------------------------------------------------------------------------
BAD = [
    ("adaq", "means", np.array([np.nan, 1], "<f4"), "mean"),
    ("adaq", "means", np.array([1, -1], "<f4"), "mean"),
    ("adaq", "count", np.array([2**32 - 1], "<u4"), "at most"),
    ("adaq", "signs", np.zeros(9, np.uint8), "signs"),
    ("strom(threshold=1)", "count", np.array([2001], "<u4"), "at most 2000"),
    ("strom(threshold=1)", "codes", np.zeros(1, np.uint8), "codes"),
    ("strom(threshold=1, multi=True)", "width", np.array([0], np.uint8), "0 bits"),
    ("strom(threshold=1, multi=True)", "width", np.array([33], np.uint8), "33 bits"),
    ("wangni", "level", np.array([np.inf], "<f4"), "level"),
    ("wangni", "count", np.array([2001], "<u4"), "at most"),
    ("wangni", "signs", np.zeros(250, np.uint8), "signs"),
    ("atomo", "left", np.zeros(41, "<f4"), "41"),
    ("atomo", "right", np.zeros(500, "<f4"), "matrix of 40 x 50"),
    ("atomo", "left", np.full(80, np.inf, "<f4"), "."),
    ("demo", "values", np.full(64, 0x7F80, "<u2"), "not finite"),
    ("dgc > fp16", "count", np.array([27], "<u4"), "at most 26"),
    ("dgc > fp16", "value values", np.zeros(3, "<u2"), "."),
    ("induced", "biased positions", np.full(23, 255, np.uint8), "."),
]


@pytest.mark.parametrize("text,name,value,match", BAD)
def test_bad_fields(gaussian, text, name, value, match):
    """If one field of a valid payload is replaced, PayloadError says what is wrong."""
    x, spec = gaussian[:40, :50].reshape(-1), TensorSpec("w", (40, 50))
    part = grace_ext.grace(f"{text} + none").compressor
    payload, _ = part.compress(NUMPY.ops, x, spec, INFO, part.init(NUMPY.ops, spec, INFO))
    names = [field.name for field in part.fields(spec)]
    changed = list(payload)
    changed[names.index(name)] = value.view(np.uint8)
    with pytest.raises(PayloadError, match=match):
        part.decompress(NUMPY.ops, changed, spec, INFO)


def test_dgc_samples_are_private_or_shared(world):
    """The start of the sample is private to each rank, or shared by all, and new at every step."""
    draws = {text: [] for text in ("private", "shared")}
    for sampling, seen in draws.items():
        for step in range(3):
            infos = [StepInfo(step=step, rank=rank, size=2, divisor=2) for rank in range(2)]
            keys = [(i.private_key if sampling == "private" else i.shared_key)("w", "dgc") for i in infos]
            seen.append([int(rng.words(key, 1)[0]) for key in keys])
    assert all(a != b for a, b in draws["private"]) and all(a == b for a, b in draws["shared"])
    with tapped() as seen:  # if the sample is shared, equal gradients give equal payloads on both ranks
        world.step(world.cluster(grace_ext.grace("dgc(ratio=0.02, sampling='shared') + none"), 2), [inputs.normal(0, 0)] * 2)
    assert seen[0].buffers[0] == seen[0].buffers[1]
