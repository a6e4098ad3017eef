"""Every combination of three parts works, or is rejected at composition with a fix; and the catalogue lists which."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import grace_ext
from grace_ext.cli.catalogue import KINDS, fits
from grace_ext.errors import IncompatiblePartsError
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY

SHAPES = {"v": (40,), "m": (24, 18), "one": (1,)}


@pytest.mark.parametrize("compressor", grace_ext.compressors.names())
def test_every_triple_runs_or_is_refused(compressor):
    """A triple of bare names is accepted if and only if its pairs fit; then two steps on two ranks give finite results."""
    accepted = 0
    for memory, communicator in itertools.product(grace_ext.memories.names(), grace_ext.communicators.names()):
        spec = f"{compressor} + {memory} @ {communicator}"
        parts = [KINDS[kind].get(name).create() for kind, name in zip(KINDS, (compressor, memory, communicator), strict=False)]
        expected = all(fits(*pair) for pair in itertools.combinations(parts, 2))
        try:
            g = grace_ext.grace(spec)
        except IncompatiblePartsError as error:
            assert not expected, spec
            assert "use " in str(error) or "'" in str(error), spec
            continue
        assert expected, spec
        accepted += 1
        cluster = NUMPY.cluster(g, 2)
        for step in range(2):
            for out in NUMPY.everywhere(cluster, inputs.ranks(2, step, shapes=SHAPES)):
                assert {name: array.shape for name, array in out.items()} == SHAPES, spec
                assert all(np.isfinite(array).all() for array in out.values()), spec
    assert accepted >= 3
