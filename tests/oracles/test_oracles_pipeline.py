"""Compares pipelines of two compressors (one selects, one encodes the values) with their equations in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError, SpecSyntaxError
from grace_ext.parts import rng
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, states

from . import oracles
from .test_oracles import RUNS, VECTOR, compare
from .test_oracles_sparse import Stepwise, count, info, largest


def qsgd(values: np.ndarray, bits: int, key, bucket: int = 512) -> np.ndarray:
    """Returns qsgd's values, computed in float32 where the library does, so that the random draws decide alike."""
    s, out = 2 ** (bits - 1) - 1, np.zeros(values.size)
    words = rng.words(key, values.size) >> 8
    for start in range(0, values.size, bucket):
        x = values[start : start + bucket]
        norm = np.float32(math.sqrt((x**2).sum()))
        scaled = abs(x).astype(np.float32) * (np.float32(s) / norm)
        low = np.floor(scaled)
        level = low + (words[start : start + bucket].astype(np.float32) < (scaled - low) * np.float32(2**24))
        out[start : start + bucket] = np.sign(x) * np.minimum(level, s) * float(norm) / s
    return out


def pipeline(select, encode):
    def one(x, rank, step):
        positions, out = select(x), np.zeros_like(x)
        if positions.size:
            out[positions] = encode(x[positions], info(step, rank).private_key("w", "qsgd"))
        return out

    return Stepwise(one)


def top(ratio):
    return lambda x: np.sort(largest(x, count(ratio, x.size)))


def scaled_qsgd(bits, bucket, scale):
    s = 2 ** (bits - 1) - 1

    def encode(values, key):
        b = min(values.size, bucket)
        omega = min(b / s**2, math.sqrt(b) / s) if scale else 0
        return qsgd(values, bits, key, bucket) / (1 + omega)

    return encode


def unscaled(select, codec):
    return f"pipeline(select={select}, codec={codec}, scale=False)"


def sign_of(values, key):
    return abs(values).mean() * np.sign(values)


def half_of(values, key):
    return oracles.half("float16")(values)


PIPELINES = {
    "topk(ratio=0.2) > qsgd(bits=4)": lambda: pipeline(top(0.2), scaled_qsgd(4, 512, True)),
    "topk(ratio=0.2) > qsgd(bits=2, bucket=16)": lambda: pipeline(top(0.2), scaled_qsgd(2, 16, True)),
    unscaled("topk(ratio=0.2)", "qsgd(bits=4)"): lambda: pipeline(top(0.2), scaled_qsgd(4, 512, False)),
    "topk(ratio=0.2) > sign": lambda: pipeline(top(0.2), sign_of),
    unscaled("topk(ratio=0.2)", "efsignsgd"): lambda: pipeline(top(0.2), sign_of),
    "topk(ratio=0.2) > fp16": lambda: pipeline(top(0.2), half_of),
    unscaled("topk(ratio=0.2)", "fp16"): lambda: pipeline(top(0.2), half_of),
    "threshold(threshold=7) > fp16": lambda: pipeline(lambda x: np.flatnonzero(abs(x) >= 7), half_of),
    "threshold(threshold=1e6) > fp16": lambda: pipeline(lambda x: np.flatnonzero(abs(x) >= 1e6), half_of),
    "threshold(threshold=1e6) > qsgd(bits=4)": lambda: pipeline(lambda x: np.flatnonzero(abs(x) >= 1e6), scaled_qsgd(4, 512, True)),
}


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("text", PIPELINES)
def test_pipelines(world, text, memory, size):
    """The first stage gives positions, the second values, divided by 1 + omega if it is unbiased; an empty selection decodes to zeros."""
    compare(world, grace_ext.grace(f"{text} + {memory}"), PIPELINES[text](), size, VECTOR, relative=3e-6)


def test_pipelines_that_select_nothing_send_counts_only(world):
    """If no element reaches the threshold, only counts are sent, and everything stays in the residual."""
    cluster = world.cluster(grace_ext.grace("threshold(threshold=1e6) > qsgd + residual"), 2)
    given = [{"w": x} for x in inputs.grid(2, 0, VECTOR)]
    assert not world.step(cluster, given)["w"].any()
    assert all(np.array_equal(held["residual/w"], x["w"]) for held, x in zip(states(cluster, world), given, strict=True))
    assert max(cluster.wire_bytes) <= 24 + 4 + 4 * 3


def test_pipelines_are_contractions():
    """With the scale, delta = k / (d (1 + omega)) for any omega; it is promised for unbiased codecs only."""
    part = grace_ext.grace("topk(ratio=0.1) > qsgd(bits=2) + none").compressor
    assert part.delta(1000) == pytest.approx(0.1 / (1 + 10))
    assert grace_ext.grace("topk(ratio=0.1) > sign + none").compressor.delta(1000) is None
    x = inputs.normal(0, 0, shapes={"w": (1000,)})["w"]
    errors = []
    for step in range(200):
        payload, _ = part.compress(NUMPY.ops, x, TensorSpec("w", x.shape), info(step, 0), {})
        errors.append(((part.decompress(NUMPY.ops, payload, TensorSpec("w", x.shape), info(step, 0)) - x) ** 2).sum())
    assert np.mean(errors) <= (1 - part.delta(1000)) * (x**2).sum()


def test_pipelines_that_cannot_be():
    """The first stage must pick positions, the second must encode every value, and there must be two stages."""
    for text in ("qsgd > topk", "randomk > qsgd", "topk > topk", "topk > powersgd", "topk > signsgd", "topk > signum", "adaq > qsgd"):
        with pytest.raises(IncompatiblePartsError, match="stage"):
            grace_ext.grace(f"{text} + none")
    with pytest.raises(SpecSyntaxError, match="3 stages"):
        grace_ext.grace("topk > qsgd > fp16 + none")
    for select in ("topk", "dgc", "sidco", "global_topk", "threshold"):
        assert grace_ext.grace(f"{select} > qsgd(bits=4) + residual").compressor.select.name == select
