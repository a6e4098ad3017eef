"""What comes out has the shape and dtype of what went in, is finite, and depends on nothing but the input and the step."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.spec import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states, tapped

from .. import catalog

INFO = StepInfo(step=3, rank=1, size=2, divisor=2)


def compressor_of(text: str):
    return grace_ext.grace(f"{text} + none").compressor


def round_trip(world, text: str, x: np.ndarray, info: StepInfo = INFO) -> np.ndarray:
    """decompress(compress(x)), flat."""
    compressor, spec = compressor_of(text), TensorSpec("w", x.shape, x.dtype.name)
    ops = world.ops
    flat = ops.ingest(world.tensor(x))
    state = compressor.init(ops, spec, info)
    payload, _ = compressor.compress(ops, flat, spec, info, state)
    return np.array(ops.host(compressor.decompress(ops, payload, spec, info)))


@pytest.mark.parametrize(
    ("world", "spec", "dtype"),
    catalog.on_worlds(catalog.ALL, "float32") + catalog.on_worlds(catalog.FEEDBACK, "float64", "float16", "bfloat16", worlds=[NUMPY]),
)
def test_shape_and_dtype(world, spec, dtype):
    """Every mix returns the input's shape and dtype, finite, for 0-d, empty, one-element, strided and other tensors; and the same
    bytes on every rank, so that replicas never drift (but for memories that say they do)."""
    g, size = grace_ext.grace(spec), 2
    cluster = world.cluster(g, size)
    for step in range(2):
        gradients = inputs.ranks(size, step, dtype)
        returned = world.everywhere(cluster, gradients)
        assert len(returned) == size and all(same_bits(returned[0], other) or g.memory.diverges for other in returned[1:])
        out = returned[0]
        assert list(out) == list(gradients[0])
        for name, array in out.items():
            assert array.shape == inputs.SHAPES[name] and array.dtype == gradients[0][name].dtype, name
            assert np.isfinite(array.astype(np.float64)).all(), name


@pytest.mark.parametrize(("world", "spec"), catalog.on_worlds(catalog.ALL))
def test_zeros_decode_to_exact_zeros(world, spec):
    """A zero gradient on all ranks changes nothing, whatever the compressor: no 0/0, no vote, no drift."""
    cluster = world.cluster(grace_ext.grace(spec), 2)
    zeros = [{name: np.zeros(shape, np.float32) for name, shape in inputs.SHAPES.items()}] * 2
    for _ in range(2):
        out = world.step(cluster, zeros)
        assert not any(array.any() for array in out.values()), [name for name, array in out.items() if array.any()]
        assert not any(a.any() for held in states(cluster, world) for k, a in held.items() if k.startswith("residual/"))


@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_adversarial_values_stay_finite(world, text):
    """Zeros, ties, subnormals, the largest floats: decoded values are finite, and zeros stay zeros."""
    for shape in ((1,), (7,), (600,), (24, 50)):
        for kind, x in inputs.adversarial(int(np.prod(shape))).items():
            if compressor_of(text).rounds and np.abs(x).max() > 1e30:
                continue  # factors are sums over rows and columns; what an overflow may leave behind is tested below
            out = round_trip(world, text, x.reshape(shape))
            assert out.shape == (x.size,) and out.dtype == np.float32
            assert np.isfinite(out).all(), (kind, shape)
            if "zeros" in kind:
                assert not out.any(), (kind, shape)


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_float64_beyond_float32_does_not_poison_the_state(world, spec):
    """A finite float64 gradient that float32 cannot hold may be clipped or flagged, but nothing non-finite is remembered."""
    cluster = world.cluster(grace_ext.grace(spec), 1)
    shapes = {"matrix": (24, 50)}
    with np.errstate(all="ignore"):
        world.step(cluster, [{"matrix": inputs.normal(0, 0, "float64", shapes)["matrix"] * 1e200}])
    assert all(np.isfinite(a).all() for held in states(cluster, world) for a in held.values())
    # A residual of 1e38 is legitimate; one that never goes away is not what this tests.
    with np.errstate(all="ignore"):
        out = world.step(cluster, inputs.ranks(1, 1, "float64", shapes))["matrix"]
    assert np.isfinite(out).all()


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_huge_float32_does_not_poison_the_state(world, spec):
    """After gradients near the largest float, whatever that step gave, later steps and the state are finite."""
    cluster = world.cluster(grace_ext.grace(spec), 2)
    shapes = {"matrix": (24, 50)}
    with np.errstate(all="ignore"):
        world.step(cluster, [{"matrix": np.full((24, 50), 3e38, np.float32)}] * 2)
        assert all(np.isfinite(a).all() for held in states(cluster, world) for a in held.values())
        world.step(cluster, inputs.ranks(2, 1, "float32", shapes))
    assert all(np.isfinite(a).all() for held in states(cluster, world) for a in held.values())


@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_float16_near_the_top_of_its_range_stays_finite(world, text):
    """Gradients of 6e4 are legal in half precision (loss scaling puts them there): the result saturates, it does not become Inf."""
    x = np.where(np.arange(1200) % 3, 6e4, -64e3).astype(np.float16).reshape(24, 50)
    out = world.step(world.cluster(grace_ext.grace(f"{text} + none"), 1), [{"w": x}])["w"]
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_determinism(world, spec):
    """The same gradients at the same steps give the same bytes on the wire, the same results and the same state."""
    runs = []
    for _ in range(2):
        cluster, outs = world.cluster(grace_ext.grace(spec), 2), []
        with tapped() as seen:
            for step in range(2):
                outs.append({k: v.tobytes() for k, v in world.step(cluster, inputs.ranks(2, step)).items()})
        kept = [{k: v.tobytes() for k, v in held.items()} for held in states(cluster, world)]
        runs.append(([s.buffers for s in seen], outs, kept))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("world", "spec"), catalog.on_worlds(catalog.PLAIN + catalog.FEEDBACK))
def test_no_view_of_the_gradient(world, spec):
    """The gradient is not modified; overwriting it, or the result, after the step changes nothing that is remembered."""
    clean, dirty = (world.cluster(grace_ext.grace(spec), 1) for _ in range(2))
    for step in range(3):
        tensors = world.tensors(inputs.ranks(1, step))
        expected = inputs.ranks(1, step)
        out = dirty.step(tensors)
        for name, tensor in tensors[0].items():
            assert np.array_equal(world.array(tensor), expected[0][name]), name
            if world.mutable and tensor.shape:  # a 0-d numpy result may be a scalar, which nobody can write to
                out[name][...] = 777.0
                tensor[...] = 555.0
        world.step(clean, expected)
        for a, b in zip(states(clean, world), states(dirty, world), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_decompress_is_pure_and_gives_a_new_array(world, text):
    """Decoding twice gives the same, and writing into the first result changes neither the payload nor the second."""
    compressor, tensor = compressor_of(text), TensorSpec("w", (24, 50))
    ops = world.ops
    x = ops.ingest(world.tensor(inputs.normal(0, 0, shapes={"w": (24, 50)})["w"]))
    payload, _ = compressor.compress(ops, x, tensor, INFO, compressor.init(ops, tensor, INFO))
    first = compressor.decompress(ops, payload, tensor, INFO)
    kept = np.array(ops.host(first))
    first[...] = 99.0
    assert np.array_equal(np.array(ops.host(compressor.decompress(ops, payload, tensor, INFO))), kept)
