"""Every other memory and communicator: the shape and dtype of what went in, finite, zeros for zeros, and no view of the gradient."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.testing import inputs
from grace_ext.testing.worlds import LR, NUMPY, same_bits, states

from .. import catalog


@pytest.mark.parametrize("spec", catalog.MIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_and_dtype(spec, dtype):
    """Every mix returns the input's shape and dtype, finite, for 0-d, empty, one-element, strided and other tensors; and the same
    bytes on every rank, so that replicas never drift (but for memories that say they do)."""
    g, size = grace_ext.grace(spec), 2
    cluster = NUMPY.cluster(g, size)
    for step in range(2):
        gradients = inputs.ranks(size, step, dtype)
        returned = NUMPY.everywhere(cluster, gradients)
        assert len(returned) == size and all(same_bits(returned[0], other) or g.memory.diverges for other in returned[1:])
        out = returned[0]
        assert list(out) == list(gradients[0])
        for name, array in out.items():
            assert array.shape == inputs.SHAPES[name] and array.dtype == gradients[0][name].dtype, name
            assert np.isfinite(array.astype(np.float64)).all(), name


@pytest.mark.parametrize("spec", catalog.MIXES)
def test_zeros_decode_to_exact_zeros(spec):
    """A zero gradient on all ranks changes nothing, whatever the compressor: no 0/0, no vote, no drift."""
    cluster = NUMPY.cluster(grace_ext.grace(spec), 2)
    zeros = [{name: np.zeros(shape, np.float32) for name, shape in inputs.SHAPES.items()}] * 2
    for _ in range(2):
        out = NUMPY.step(cluster, zeros)
        assert not any(array.any() for array in out.values()), [name for name, array in out.items() if array.any()]
        assert not any(a.any() for held in states(cluster, NUMPY) for k, a in held.items() if k.startswith("residual/"))


@pytest.mark.parametrize("spec", catalog.MIXES)
def test_no_view_of_the_gradient(spec):
    """The gradient is not modified; overwriting it, or the result, after the step changes nothing that is remembered."""
    clean, dirty = (NUMPY.cluster(grace_ext.grace(spec), 1) for _ in range(2))
    for step in range(3):
        tensors = NUMPY.tensors(inputs.ranks(1, step))
        expected = inputs.ranks(1, step)
        out = dirty.step(tensors, lr=LR)
        out = out[0] if isinstance(out, list) else out
        for name, tensor in tensors[0].items():
            assert np.array_equal(NUMPY.array(tensor), expected[0][name]), name
            if tensor.shape:  # a 0-d numpy result may be a scalar, which nobody can write to
                out[name][...] = 777.0
                tensor[...] = 555.0
        NUMPY.step(clean, expected, lr=LR)
        for a, b in zip(states(clean, NUMPY), states(dirty, NUMPY), strict=True):
            assert same_bits(a, b)
