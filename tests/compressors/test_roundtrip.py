"""All other memories and communicators keep shape and dtype, give finite results, zeros for zeros, and no view of the gradient."""

from __future__ import annotations

import pytest

from grace_ext.testing.checks import check_no_view, check_shapes, check_zeros
from grace_ext.testing.worlds import NUMPY

from .. import catalog


@pytest.mark.parametrize("spec", catalog.MIXES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_and_dtype(spec, dtype):
    """They are kept for 0-d, empty, one-element, strided and other tensors; results are the same bits on every rank."""
    check_shapes(NUMPY, spec, dtype)


@pytest.mark.parametrize("spec", catalog.MIXES)
def test_zeros_decode_to_exact_zeros(spec):
    """Zero gradients on all ranks give zeros with every spec: no 0/0, no vote, no drift."""
    check_zeros(NUMPY, spec)


@pytest.mark.parametrize("spec", catalog.MIXES)
def test_no_view_of_the_gradient(spec):
    """The gradient is not modified; overwriting it, or the result, after the step changes no state."""
    check_no_view(NUMPY, spec)
