"""Every other memory and communicator: the shape and dtype of what went in, finite, zeros for zeros, and no view of the gradient."""

from __future__ import annotations

import pytest

from grace_ext.testing.contract import check_no_view, check_shapes, check_zeros
from grace_ext.testing.worlds import NUMPY

from .. import catalog


@pytest.mark.parametrize("spec", catalog.MIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_and_dtype(spec, dtype):
    """For 0-d, empty, one-element, strided and other tensors; and the same bytes on every rank, so that replicas never drift."""
    check_shapes(NUMPY, spec, dtype)


@pytest.mark.parametrize("spec", catalog.MIXES)
def test_zeros_decode_to_exact_zeros(spec):
    """A zero gradient on all ranks changes nothing, whatever the mix: no 0/0, no vote, no drift."""
    check_zeros(NUMPY, spec)


@pytest.mark.parametrize("spec", catalog.MIXES)
def test_no_view_of_the_gradient(spec):
    """The gradient is not modified; overwriting it, or the result, after the step changes nothing that is remembered."""
    check_no_view(NUMPY, spec)
