"""Each algorithm is written once: with every array library it sends the same bytes and returns the same bits."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WITH_DEVICE, WORLDS, same_bits, states, tapped

from .. import catalog

OTHERS = WORLDS[1:]
#: Worlds that have array code of their own. Of the others only the conversions need tests.
OWN = [w for w in OTHERS if w.computes]


def history(world, g, steps):
    """Returns wire bytes, results and states of several steps."""
    cluster, outs = world.cluster(g, len(steps[0])), []
    with np.errstate(all="ignore"), tapped() as seen:
        for gradients in steps:
            outs.append(world.step(cluster, gradients))
    return [(s.kind, s.label, s.dtype, s.buffers) for s in seen], outs, states(cluster, world)


def compare(world, spec: str, steps) -> None:
    g = grace_ext.grace(spec)
    wire, outs, held = history(world, g, steps)
    wire0, outs0, held0 = history(NUMPY, g, steps)
    if g.compressor.deterministic_bytes:
        assert wire == wire0
        assert all(same_bits(a, b) for a, b in zip(outs, outs0, strict=True))
        assert all(same_bits(a, b) for a, b in zip(held, held0, strict=True))
    else:
        assert [(kind, label, len(buffers[0])) for kind, label, _, buffers in wire] == [(w[0], w[1], len(w[3][0])) for w in wire0]
        for a, b in [*zip(outs, outs0, strict=True), *zip(held, held0, strict=True)]:
            for name in b:
                x, y = a[name].astype(np.float64), b[name].astype(np.float64)
                assert a[name].dtype == b[name].dtype and np.allclose(x, y, rtol=1e-2, atol=2e-2 if a[name].itemsize == 2 else 1e-4)


@pytest.mark.parametrize("world", OWN, ids=lambda w: w.name)
@pytest.mark.parametrize("spec", [s for s in catalog.MIXES if "beta" not in s])
def test_same_bytes(world, spec):
    """Two float32 steps send the same bytes; a different bit of state would change those of the second."""
    compare(world, spec, [inputs.ranks(2, step) for step in range(2)])


@pytest.mark.parametrize("world", [*OWN, *(w for w in WITH_DEVICE if w not in WORLDS)], ids=lambda w: w.name)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_same_bytes_in_other_dtypes(world, spec, dtype):
    compare(world, spec, [inputs.ranks(2, 0, dtype)])


@pytest.mark.parametrize("world", OWN, ids=lambda w: w.name)
@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_same_bytes_of_adversarial_values(world, text):
    """Bytes are the same for ties, subnormals, negative zeros and the largest floats, which libraries often treat differently."""
    g = grace_ext.grace(f"{text} + none")
    if not g.compressor.deterministic_bytes:
        pytest.skip("matrix products overflow differently")
    for d in (1, 9, 1200):
        values = inputs.adversarial(d)
        compare(world, f"{text} + none", [[values, values]])


@pytest.mark.parametrize("world", OWN, ids=lambda w: w.name)
@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_same_bytes_of_a_large_tensor(world, text):
    shape = (300, 250) if "powersgd" in text else (100_000,)
    compare(world, f"{text} + residual", [inputs.ranks(2, 0, shapes={"big": shape})])


@pytest.mark.parametrize("world", [w for w in OTHERS if w.framework != "numpy"], ids=lambda w: w.name)
def test_numpy_arrays_in_any_framework(world):
    """A LocalCluster of any framework takes numpy arrays, and returns the framework's tensors."""
    g = grace_ext.grace("topk(ratio=0.25) + residual")
    for dtype in inputs.DTYPES:
        cluster, gradients = world.cluster(g, 2), inputs.ranks(2, 0, dtype)
        out = cluster.step(gradients)
        assert not any(isinstance(tensor, np.ndarray) for tensor in out.values())
        assert same_bits(world.arrays(out), NUMPY.step(NUMPY.cluster(g, 2), gradients))
