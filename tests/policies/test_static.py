"""Tests policies by size and name: which spec a tensor gets, how policies are written, and what is logged or rejected."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError, ParameterError, SpecSyntaxError, UnknownPartError, UnsupportedError
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY

SHAPES = {"embed.weight": (300, 20), "embed.bias": (20,), "out.weight": (40, 50), "out.bias": (40,)}
SPECS = (
    *grace_ext.policies.names(),
    "by_size(min_elements=10, small=fp16, large=topk(ratio=0.1) > qsgd(bits=4) + residual)",
    "by_name({'*.bias': none, 'embed*': topk(ratio=0.001) + residual, '*': by_size}, default=powersgd(rank=2) + residual @ allreduce)",
    "warmup(steps=3, then=by_size(large=accordion(high=qsgd(bits=8), low=qsgd(bits=2), threshold=0.25, interval=7)))",
    "every(10, none, lgreco(base=powersgd(rank=4) + residual, every=50, window=5, alpha=0.9, low=0.5, high=2.0, choices=4))",
    "ratio_warmup(steps=100, stages=4, then=topk(ratio=0.001) > fp16 + residual)",
)


@pytest.mark.parametrize("text", SPECS)
def test_written_and_read_again(text):
    """A policy is equal after str, repr and JSON with its keys in any order."""
    g = grace_ext.grace(text, seed=3)
    assert grace_ext.grace(str(g), seed=3) == g == grace_ext.grace(g)
    assert grace_ext.grace(json.loads(json.dumps(g.to_config(), sort_keys=True))) == g
    assert eval(repr(g), {"grace": grace_ext.grace}) == g
    assert g != grace_ext.grace("none") and g != grace_ext.grace(text)
    assert grace_ext.grace(policy=g.policy, seed=3) == grace_ext.grace(policy=text, seed=3) == g
    assert hash(g.policy) == hash(grace_ext.grace(text).policy)


def test_quotes_instances_and_configurations_mean_the_same():
    expected = grace_ext.grace("by_size(large=topk(ratio=0.01) + residual)")
    by_size, topk = grace_ext.policies.get("by_size"), grace_ext.grace("topk(ratio=0.01) + residual")
    assert expected == grace_ext.grace("by_size(large='topk(ratio=0.01) + residual')")
    assert expected == grace_ext.grace(policy=by_size(large=topk)) == grace_ext.grace(by_size(large=topk.route))
    assert expected == grace_ext.grace({"policy": {"id": "by_size", "large": topk.to_config() | {"seed": 0}}})
    assert grace_ext.grace("by_name({'a': none})") == grace_ext.grace({"policy": {"id": "by_name", "patterns": {"a": "none"}}})
    assert grace_ext.grace("by_size(small=None)") == grace_ext.grace("by_size")


def expected_bytes(cluster_spec: dict[str, str]) -> dict[str, np.ndarray]:
    """Returns each tensor's result of the third step, in a cluster of its own."""
    out = {}
    for name, spec in cluster_spec.items():
        cluster = NUMPY.cluster(grace_ext.grace(spec), 2)
        for step in range(3):
            gradients = [{name: g[name]} for g in inputs.ranks(2, step, shapes=SHAPES)]
            out[name] = NUMPY.step(cluster, gradients)[name]
    return out


@pytest.mark.parametrize(
    ("policy", "of_tensor"),
    [
        ("by_size(min_elements=41, small=none, large=topk(ratio=0.1) + residual)",
         {n: "none" if n.endswith("bias") else "topk(ratio=0.1) + residual" for n in SHAPES}),
        ("by_size(min_elements=40, small=none, large=topk(ratio=0.1) + residual)",
         {n: "none" if n == "embed.bias" else "topk(ratio=0.1) + residual" for n in SHAPES}),
        ("by_name({'*.bias': none, 'embed*': topk(ratio=0.02) + residual}, default=efsignsgd + residual)",
         {"embed.weight": "topk(ratio=0.02) + residual", "embed.bias": "none", "out.weight": "efsignsgd + residual", "out.bias": "none"}),
        ("by_name({'embed*': topk(ratio=0.02) + residual, '*.bias': none}, default=efsignsgd + residual)",
         {"embed.weight": "topk(ratio=0.02) + residual", "embed.bias": "topk(ratio=0.02) + residual", "out.weight": "efsignsgd + residual",
          "out.bias": "none"}),
        ("by_name({'out.????': by_size(min_elements=50, small=fp16)})",
         {"embed.weight": "none", "embed.bias": "none", "out.weight": "none", "out.bias": "fp16"}),
    ],
)  # fmt: skip
def test_each_tensor_goes_where_it_should(policy, of_tensor):
    """In one bucket each tensor gives the same bits as alone under its own spec, and as many bytes."""
    cluster = NUMPY.cluster(grace_ext.grace(policy), 2)
    for step in range(3):
        got = NUMPY.step(cluster, inputs.ranks(2, step, shapes=SHAPES))
    for name, expected in expected_bytes(of_tensor).items():
        assert got[name].tobytes() == expected.tobytes(), name
    g = grace_ext.grace(policy)
    for name, shape in SHAPES.items():
        spec = TensorSpec(name, shape)
        assert g.nbytes(spec) == grace_ext.grace(of_tensor[name]).nbytes(spec)
        assert g.parts_for(spec) == grace_ext.grace(of_tensor[name]).parts_for(spec)


def test_bare_specs_bypass_nothing():
    """Without a policy a small tensor is compressed like any other, if that is smaller."""
    compressor, _, _ = grace_ext.grace("topk(ratio=0.01) + residual").parts_for(TensorSpec("b", (64,)))
    assert compressor.name == "topk"
    compressor, _, _ = grace_ext.grace("by_size").parts_for(TensorSpec("b", (64,)))
    assert compressor.name == "none"


def told(caplog, policy):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "grace_ext"):
        cluster = NUMPY.cluster(grace_ext.grace(policy), 2)
        for step in range(3):
            NUMPY.step(cluster, inputs.ranks(2, step, shapes=SHAPES))
    return [record.getMessage() for record in caplog.records]


def test_patterns_that_match_nothing_and_patterns_that_overlap_are_told_once(caplog):
    (nothing,) = told(caplog, "by_name({'*.scale': none, '*.bias': none}, default=none)")
    assert "'*.scale' matches no parameter" in nothing and "embed.weight" in nothing
    (overlap,) = told(caplog, "by_name({'*.bias': none, 'embed*': fp16}, default=none)")
    assert "'*.bias' comes before 'embed*'" in overlap and "embed.bias" in overlap and "embed.weight" not in overlap
    (small,) = told(caplog, "by_size(min_elements=100_000)")
    assert "no parameter has min_elements=100000" in small and "6000" in small
    assert told(caplog, "by_name({'*.bias': none, '*.weight': fp16}, default=none)") == []
    # In a nested policy only the parameters that reach it count.
    (inner,) = told(caplog, "by_name({'*.bias': by_name({'*.weight': none})}, default=none)")
    assert "'*.weight' matches no parameter; the parameters are embed.bias, out.bias" in inner


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("by_size(large=topk) + residual", SpecSyntaxError, "is a policy, which is a spec by itself"),
        ("by_siz(large=topk)", UnknownPartError, "by_size"),
        ("by_size(large=topkk)", UnknownPartError, "topk"),
        ("by_size(large=topk(ratio=2))", ParameterError, "ratio must be a number in"),
        ("by_size(large=topk +)", SpecSyntaxError, "cannot read"),
        ("by_size(large='topk +')", ParameterError, "large must be a spec.*cannot read 'topk \\+'"),
        ("by_size(large=topk + residual @ allreduce)", IncompatiblePartsError, "cannot be summed"),
        ("by_size(large=7)", ParameterError, "large must be a spec"),
        ("by_size(min_elements=-1)", ParameterError, "min_elements must be a whole number"),
        ("by_size(size=3)", ParameterError, "its knobs are min_elements, small, large"),
        ("by_name('*.bias')", ParameterError, "specs by pattern"),
        ("by_name({3: none})", ParameterError, "specs by pattern"),
        ("by_name({'a': none, **{'b': none}})", SpecSyntaxError, "cannot read"),
        ("warmup(steps=-1)", ParameterError, "steps must be"),
        ("every(0)", ParameterError, "n must be"),
        ("ratio_warmup(then=powersgd + residual)", IncompatiblePartsError, "changes ratio of a compressor, and powersgd"),
        ("ratio_warmup(then=by_size)", ParameterError, "a spec without a policy"),
        ("lgreco(base=signsgd + none)", IncompatiblePartsError, "ratio or rank or bits"),
        ("lgreco(base=qsgd(levels=10))", IncompatiblePartsError, "has none that is set"),
        ("lgreco(every=5)", ParameterError, "window=10 is more than every=5"),
        ("accordion(high=topk(ratio=0.001) + residual, low=topk(ratio=0.01) + residual)", ParameterError, "Swap them"),
        ("accordion(threshold=0)", ParameterError, "threshold must be"),
        ("by_size(small=fp16, large=topk + dgc)", IncompatiblePartsError, "is the momentum of the training.*'fp16 @ allreduce' would have"),
    ],
)
def test_bad_policies_are_refused_with_what_to_do(text, error, says):
    with pytest.raises(error, match=says):
        grace_ext.grace(text)


def test_bad_calls():
    with pytest.raises(SpecSyntaxError, match="a policy is a spec by itself"):
        grace_ext.grace(policy="by_size", memory="residual")
    with pytest.raises(ParameterError, match="no seed"):
        grace_ext.policies.get("by_size")(large=grace_ext.grace("topk + residual", seed=4))
    with pytest.raises(SpecSyntaxError, match="is a policy, where a compressor|is a compressor, where a policy"):
        grace_ext.grace(policy=grace_ext.grace("fp16").compressor)
    g = grace_ext.grace("by_size")
    for part in ("compressor", "memory", "communicator"):
        with pytest.raises(UnsupportedError, match=f"has no {part} of its own.*leaves"):
            getattr(g, part)


def test_small_tensors_keep_a_memory_that_is_the_momentum():
    """If other tensors have a momentum memory, `none` means dense through that memory: no tensor trains without momentum."""
    cluster = NUMPY.cluster(grace_ext.grace("by_size(min_elements=100, large=topk(ratio=0.5) + dgc(momentum=0.5))"), 2)
    total = 0.0
    for step in range(3):
        gradients = inputs.ranks(2, step, shapes=SHAPES)
        got = NUMPY.step(cluster, gradients)["out.bias"]
        total = 0.5 * total + sum(g["out.bias"].astype(np.float64) for g in gradients) / 2
    assert np.allclose(got, total, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "per_node"),
    [
        ("by_name({'flat': topk(ratio=0.1) + residual}, default=topk(ratio=0.1) + residual @ hierarchical)", 2),
        ("by_size(min_elements=100, small=none, large=topk(ratio=0.1) + residual @ hierarchical)", 2),
        ("by_size(min_elements=100, small=none @ allreduce, large=qsgd(bits=8) + none @ reduce_scatter)", 1),
        ("by_size(min_elements=9999, small=none @ reduce_scatter, large=topk(ratio=0.1) + residual)", 1),
        ("by_size(min_elements=9999, small=none, large=topk(ratio=0.1) + cser)", 1),
    ],
)
def test_declared_bytes_bound_what_is_sent(spec, per_node):
    """`nbytes` counts what a tensor really goes through: two levels, if others have them, and the memory that it keeps beside them."""
    g, shapes = grace_ext.grace(spec), {"flat": (60,), "large": (40, 50)}
    for name, shape in shapes.items():
        assert _most_sent(g, {name: shape}, per_node) <= g.nbytes(TensorSpec(name, shape), 4) + 200, name


def _most_sent(g, shapes, per_node):
    cluster = grace_ext.LocalCluster(g, 4, ranks_per_node=per_node)
    most = 0
    for step in range(3):
        cluster.step(inputs.ranks(4, step, shapes=shapes), lr=0.1)
        most = max(most, *cluster.wire_bytes)
    return most
