"""Conversions round once in every library, keep subnormal numbers, and signed zeros stay what they are on every path."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS, same_bits, states

from .. import catalog

by_world = pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
#: float64 beside the ties of 16-bit floats: by less than float32 can tell, above and below; and their smallest numbers.
NEAR = [tie * (1 + side * 2.0**-40) for tie in (1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8) for side in (-1, 0, 1)]
SMALL = [2.0**-25 * (1 + 2.0**-45), 3 * 2.0**-25 * (1 - 2.0**-45), 2.0**-134 * (1 + 2.0**-30), 3 * 2.0**-134, 1e-320, 2.0**-150, 2.0**-24]
LARGE = [65519.999999, 65504.0, 65520.0, 3.3895e38, 3.4e38, 1e300]


def nearest(x: float, dtype: np.dtype) -> float:
    """Returns the number of a 16-bit dtype that is nearest to x, ties to even, found among all of them; the largest, if x is larger."""
    codes = np.arange(0x7C00 if dtype == np.float16 else 0x7F80)  # below that of Inf
    values = codes.astype(np.uint16).view(dtype).astype(np.float64)
    gap = np.abs(values - min(abs(x), values[-1]))  # exact where it is least
    best = np.flatnonzero(gap == gap.min())
    chosen = values[best[codes[best] % 2 == 0]] if len(best) > 1 else values[best]
    return float(np.copysign(chosen[0], x))


@by_world
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_float64_is_rounded_once(world, name):
    """To 16 bits, as bytes and as a user's tensor: not to float32 first, which makes ties of numbers that are none."""
    dtype = np.dtype(np.float16 if name == "float16" else ml_dtypes.bfloat16)
    x = np.array([sign * value for value in NEAR + SMALL + LARGE + [0.0] for sign in (1, -1)])
    wanted = np.array([nearest(value, dtype) for value in x]).astype(dtype)
    ops = world.ops
    found = np.array(ops.host(ops.to_bytes(ops.upload(x), name))).view(dtype)
    assert found.tobytes() == wanted.tobytes()
    emitted = world.array(ops.emit(ops.upload(x), TensorSpec("x", x.shape, name)))
    assert emitted.dtype == dtype and emitted.tobytes() == wanted.tobytes()


@by_world
@pytest.mark.parametrize("name", list(inputs.DTYPES))
def test_subnormal_numbers_reach_the_user(world, name):
    """The smallest numbers of every dtype are not flushed to zero on their way in or out; nor do Inf, NaN and zeros change."""
    dtype = np.dtype(inputs.DTYPES[name])
    bits = np.array([0, 1, 2, 3, 7, 0x7F], f"u{dtype.itemsize}")
    x = np.concatenate([bits.view(dtype), -bits.view(dtype), np.array([np.inf, -np.inf, np.nan], dtype)])
    spec = TensorSpec("x", x.shape, name)
    out = world.array(world.ops.emit(world.ops.copy(world.ops.ingest(world.tensor(x))), spec))
    assert out.dtype == dtype and out[:-1].tobytes() == x[:-1].tobytes() and np.isnan(out[-1])


@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_negative_zeros(text):
    """Results have the same bits, signs of zeros included, with kernels and without, written over the gradients or not, over any
    communicator that fits."""
    rng = np.random.default_rng(0)
    plain, torch_host = (next(w for w in WORLDS if w.name == name) for name in ("numpy-plain", "torch-host"))
    for rest in ("+ none", "+ residual(beta=0.9) @ allgather", "+ residual", "+ residual @ reduce_scatter"):
        try:
            g = grace_ext.grace(f"{text} {rest}")
        except IncompatiblePartsError:
            continue
        if not g.compressor.deterministic_bytes:
            continue
        made = (np.where(rng.random((24, 50)) < 0.6, -0.0, rng.choice([-1, 0, 1], (24, 50))).astype(np.float32) for _ in range(2))
        gradients, runs = [[{"m": x}] * 2 for x in made], []
        for world, in_place in ((NUMPY, False), (plain, False), (torch_host, False), (torch_host, True)):
            cluster, outs = world.cluster(g, 2), []
            if in_place:
                world.in_place(cluster)
            for step in gradients:
                outs.append({name: array.copy() for name, array in world.step(cluster, step).items()})
            runs.append([*outs, *states(cluster, world)])
        for other in runs[1:]:
            assert all(same_bits(a, b) for a, b in zip(other, runs[0], strict=True)), g


def test_graphs_compute_with_subnormal_numbers():
    """TensorFlow's own threads take subnormal numbers for zeros; what runs in `numpy_function` does not, and leaves them as they were."""
    import tensorflow as tf

    from grace_ext.frameworks.tensorflow.ops import numpy_function

    x = np.array([1e-40, -1.4e-45, 1.0], np.float32)

    @tf.function
    def ours(value):
        return numpy_function(lambda array: array * np.float32(1), [value], [tf.float32])[0]

    @tf.function
    def theirs(value):
        return tf.numpy_function(lambda array: array * np.float32(1), [value], tf.float32)

    before = theirs(x).numpy().tobytes()
    assert ours(x).numpy().tobytes() == x.tobytes()
    assert theirs(x).numpy().tobytes() == before
