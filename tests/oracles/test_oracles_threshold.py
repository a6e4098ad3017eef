"""threshold(like_topk=...) is the threshold 1 / (2 sqrt(k)) of the whole model, wherever and however its tensors are exchanged."""

from __future__ import annotations

import math

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import ParameterError, UnsupportedError
from grace_ext.local.cluster import LocalSGDCluster
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states

SHAPES = {"w": (40, 30), "b": (30,), "v": (7, 3, 2), "one": (1,)}
ELEMENTS = 1200 + 30 + 42 + 1


def gradients(size: int, step: int) -> list[dict[str, np.ndarray]]:
    return [{name: x * np.float32(0.2) for name, x in each.items()} for each in inputs.ranks(size, step, shapes=SHAPES)]


@pytest.mark.parametrize(
    ("elements", "least"),
    [(11_173_962, 4.73e-3), (11_260_354, 4.712e-3), (6_166_250, 6.37e-3), (11_220_132, 4.72e-3), (6_258_500, 6.32e-3)],
)
def test_the_numbers_of_the_paper(elements, least):
    """like_topk=0.001 gives what the authors' scripts have for their models, to three digits."""
    compressor = grace_ext.grace("threshold(like_topk=0.001) + none").compressor
    info = StepInfo(step=0, rank=0, size=1, divisor=1, elements=elements)
    x = np.array([least * 0.997, -least * 0.997, least * 1.003, -least * 1.003], np.float32)
    positions, _ = compressor.select(NUMPY.ops, x, TensorSpec("w", (4,)), info, {})
    assert positions.tolist() == [2, 3]


@pytest.mark.parametrize(
    "spec",
    [
        "threshold({}) + residual",
        "threshold({}, values='bf16') + residual @ sparse_allreduce",
        "threshold({}) > fp16 + residual",
        "by_size(large=threshold({}) + residual, small=none, min_elements=100)",
        "every(n=2, then=threshold({}) + residual, otherwise=topk(ratio=0.5) + residual)",
    ],
)
def test_equals_the_threshold_that_it_stands_for(world, spec):
    """Results and state have the bits of threshold=1 / (2 sqrt(ceil(0.01 d))), d counting every parameter, in every library."""
    least = 1 / (2 * math.sqrt(math.ceil(0.01 * ELEMENTS)))
    runs = []
    for knob in ("like_topk=0.01", f"threshold={least!r}"):
        cluster = world.cluster(grace_ext.grace(spec.format(knob)), 3)
        outs = [world.step(cluster, gradients(3, step)) for step in range(3)]
        runs.append([*outs, *states(cluster, world)])
    for ours, expected in zip(*runs, strict=True):
        assert same_bits(ours, expected)
    assert any((x == 0).any() and (x != 0).any() for x in runs[0][1].values())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_drifts_of_local_training(asynchronous):
    """LocalSGD counts the elements of the whole drift."""
    least = 1 / (2 * math.sqrt(math.ceil(0.02 * ELEMENTS)))
    runs = []
    for knob in ("like_topk=0.02", f"threshold={least!r}"):
        cluster = LocalSGDCluster(f"threshold({knob}) + residual", 2, every=2, asynchronous=asynchronous)
        models = gradients(1, 99) * 2
        cluster.start(models)
        for step in range(4):
            moved = zip(models, gradients(2, step), strict=True)
            models = cluster.step([{name: x - np.float32(0.3) * g[name] for name, x in model.items()} for model, g in moved])
        runs.append(models)
    assert all(same_bits(*each) for each in zip(*runs, strict=True))


def test_what_cannot_be_known_is_an_error():
    """Without the model's size the error names the number's formula; a threshold beside the rule is refused; neither is 0.01."""
    compressor = grace_ext.grace("threshold(like_topk=0.01) + none").compressor
    with pytest.raises(UnsupportedError, match=r"like_topk=0.01\).*give the number instead, such as threshold\(threshold=0.005\)"):
        compressor.compress(NUMPY.ops, np.ones(4, np.float32), TensorSpec("w", (4,)), StepInfo(0, 0, 1, 1), {})
    assert compressor.kappa(100) is None
    with pytest.raises(ParameterError, match="both say what is sent: give one"):
        grace_ext.grace("threshold(threshold=0.1, like_topk=0.01) + none")
    plain = grace_ext.grace("threshold + residual")
    assert str(plain) == "threshold(threshold=0.01) + residual @ allgather" and plain == grace_ext.grace("threshold(0.01) + residual")
    assert str(grace_ext.grace("threshold(like_topk=0.01) + residual")) == "threshold(like_topk=0.01) + residual @ allgather"
