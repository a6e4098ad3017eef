"""Tests spec strings, configurations and GRACE's own parameters: what is read, what is rejected, and what the message says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import grace_ext
from grace_ext import from_params, grace
from grace_ext.composition import making
from grace_ext.errors import (
    BiasedCompressorWarning,
    GraceError,
    IncompatiblePartsError,
    ParameterError,
    SpecSyntaxError,
    UnboundError,
    UnknownPartError,
)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("topk(ratio=0.01) + residual @ allgather", "topk(ratio=0.01) + residual @ allgather"),
        ("  topk ( ratio = 1e-2 )+residual@allgather\n", "topk(ratio=0.01) + residual @ allgather"),
        ("\n  topk(ratio=0.01)\n    + residual\n    @ allgather\n", "topk(ratio=0.01) + residual @ allgather"),
        ("topk\r\n > qsgd(bits=4)\r\n+ residual", "topk(ratio=0.01) > qsgd(bits=4) + residual @ allgather"),
        ("topk(ratio=0.5)  # half\n+ residual", "topk(ratio=0.5) + residual @ allgather"),
        ("topk(0.5) + residual", "topk(ratio=0.5) + residual @ allgather"),
        ("topk(0.5, 'fp16') + residual", "topk(ratio=0.5, values='fp16') + residual @ allgather"),
        ("topk(ratio=1) + residual", "topk(ratio=1.0) + residual @ allgather"),
        ("none", "none @ allreduce"),
        ("None", "none @ allreduce"),
        ("fp16 @ broadcast", "fp16 @ broadcast"),
        ("qsgd() + none @ allgather", "qsgd @ allgather"),
        ("efsignsgd(block=None) + residual(beta=1)", "efsignsgd + residual @ allgather"),
        ("powersgd(rank=2.0) + residual", "powersgd(rank=2) + residual @ allreduce"),
    ],
)
def test_what_is_read(text, meaning):
    """Specs have Python's expression syntax; positional knobs come in the order of the fields."""
    assert str(grace(text)) == meaning and grace(text) == grace(meaning)


def test_keywords_take_names_instances_and_configurations():
    """Keywords take any mix of these forms; a spec together with keywords is an error."""
    wanted = grace("topk(ratio=0.1) + residual @ allgather", seed=3)
    topk, residual = grace_ext.compressors.get("topk"), grace_ext.memories.get("residual")
    for compressor in ("topk(ratio=0.1)", topk(ratio=0.1), {"id": "topk", "ratio": 0.1}, wanted.compressor):
        for memory in ("residual", residual(), {"id": "residual"}):
            assert grace(compressor=compressor, memory=memory, communicator="allgather", seed=3) == wanted
            assert grace({"compressor": compressor, "memory": memory, "seed": 3}) == wanted
    with pytest.raises(SpecSyntaxError, match="not both"):
        grace("topk", memory="residual")
    with pytest.raises(SpecSyntaxError, match="residual is a memory, where a compressor"):
        grace(compressor=residual())


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "+", "topk +", "@ allgather", "topk + residual + residual", "topk @ allgather + residual", "topk - residual",
        "topk(ratio=)", "topk(ratio=0.1", "topk.x", "topk[0.1]", "topk(ratio=x)", "topk(ratio=1/100)", "topk(ratio=__import__('os'))",
        "'topk'", "7", "topk; none", "topk, none", "lambda: topk", "topk(0.1)(0.2)", "topk(*[0.1]) + none", "topk(**{'ratio': 0.5}) + none",
        "topk(ratio=0.1, ratio=0.2) + none", "topk(ratio={[]: 1}) + none", "a\0b",
    ],
)  # fmt: skip
def test_what_cannot_be_read(text):
    """Bad text raises a SpecSyntaxError or ParameterError that shows the syntax; nothing is silently ignored or evaluated."""
    with pytest.raises((SpecSyntaxError, ParameterError)) as caught:
        grace(text)
    assert "compressor(knob=value)" in str(caught.value) or "knob" in str(caught.value)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(["topk", "qsgd", "residual", "none", "allgather", "(", ")", "=", "ratio", "0.1", "-1", "+", "@", ",", " ",
                                 "'fp16'", "values", "None", "**", "*", "{", "}", "[", "]", ":", "\\", "\n", "é", "nan", "1e999"]),
                max_size=12).map("".join))  # fmt: skip
@example("topk" + "(" * 3000)
@example("-" * 20000 + "1")
def test_any_text_is_read_or_refused(text):
    """Any text gives a Grace or raises a GraceError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(grace(text), grace_ext.Grace)
        except GraceError:
            pass


@pytest.mark.parametrize("value", [7, ["topk"], ("topk",), b"topk", object(), {"compressor": 5}, {"compressor": {"ratio": 0.1}},
                                   {"compressor": {"id": 5}}, {"compressor": ["topk"]}, {}, {"memory": "residual"}])  # fmt: skip
def test_other_types_are_refused(value):
    with pytest.raises(GraceError):
        grace(value)


def test_a_compressor_must_be_named():
    for call in (lambda: grace(), lambda: grace(memory="residual"), lambda: grace({})):
        with pytest.raises(SpecSyntaxError, match="name a compressor, one of: .*topk"):
            call()
    with pytest.raises(SpecSyntaxError, match="unknown key 'compresor'"):
        grace({"compresor": "topk"})


@pytest.mark.parametrize(("kind", "text", "wrong", "right"), [
    ("compressor", "topx + residual", "topx", "topk"), ("memory", "topk + residuel", "residuel", "residual"),
    ("communicator", "topk + residual @ allgater", "allgater", "allgather"), ("compressor", "powersdg", "powersdg", "powersgd"),
    ("compressor", "TopK", "TopK", "topk"),
])  # fmt: skip
def test_near_misses(kind, text, wrong, right):
    """The error for an unknown name lists the nearest names and all known ones."""
    with pytest.raises(UnknownPartError, match=f"no {kind} named '{wrong}'; did you mean .*'{right}'") as caught:
        grace(text)
    error = caught.value
    assert (error.kind, error.name) == (kind, wrong) and right in error.nearest and set(error.nearest) < set(error.known)
    assert isinstance(error, KeyError) and not str(error).startswith('"')


def test_a_name_like_no_other():
    with pytest.raises(UnknownPartError, match="no compressor named 'xyzzy'; Known: .*topk"):
        grace("xyzzy")


NOT_A_RATIO = [0, -0.1, 2, 1.0001, float("nan"), float("inf"), "0.1", None, True, [0.1], 1j]
BAD = (
    [(f"{c}", "ratio", v, r"a number in \(0, 1\]") for c in ("topk", "randomk") for v in NOT_A_RATIO]
    + [("qsgd", "bits", v, r"a whole number in \[2, 16\] or None") for v in (17, 1, 0, -2, 4.5, "8", True, float("nan"), 1e400)]
    + [("qsgd", "levels", v, r"a whole number in \[1, 32767\] or None") for v in (40000, 0, 32768, 0.5)]
    + [("qsgd", "bucket", v, r"a whole number in \[1, ") for v in (0, -5, None, 1.5, 2**25)]
    + [("powersgd", "rank", v, r"a whole number in \[1, 4096\]") for v in (0, -1, 1.5, "2", None, 5000)]
    + [("powersgd", "warm_start", v, "True or False") for v in (1, 0, "yes", None)]
    + [("powersgd", "feedback", v, "one of 'local', 'mean'") for v in ("Mean", None, 1, [1])]
    + [("topk", "values", v, "one of 'fp32', 'fp16', 'bf16'") for v in ("float16", None, 16)]
    + [("threshold", "threshold", v, r"a number in \[0, inf\)") for v in (-1, float("nan"), float("inf"), "x")]
    + [("efsignsgd", "block", v, r"a whole number in \[1, inf\) or None") for v in (0, -1, 2.5)]
    + [("signsgd", "ties", v, "one of 'zero', 'plus'") for v in ("minus", 0)]
)


@pytest.mark.parametrize(("name", "knob", "value", "valid"), BAD)
def test_out_of_range(name, knob, value, valid):
    """Whether from a constructor or a configuration, the message names part and knob, states the valid range, and shows the value."""
    ways = [
        lambda: grace_ext.compressors.get(name)(**{knob: value}),
        lambda: grace({"compressor": {"id": name, knob: value}, "memory": "none"}),
    ]
    for way in ways:
        with pytest.raises(ParameterError, match=rf"^{name}: {knob} must be {valid}") as caught:
            way()
        assert repr(value) in str(caught.value) and isinstance(caught.value, ValueError)


def test_ranges_of_memories():
    for knob, value, valid in (("beta", 1.1, r"\[0, 1\]"), ("beta", -0.1, r"\[0, 1\]"), ("gamma", 0, r"\(0, 1e\+06\]")):
        with pytest.raises(ParameterError, match=f"residual: {knob} must be a number in {valid}"):
            grace(f"topk + residual({knob}={value})")


def test_the_edges_of_the_ranges_are_valid():
    for text in ("topk(ratio=1)", "topk(ratio=1e-12)", "qsgd(bits=2)", "qsgd(bits=8)", "qsgd(levels=1)", "qsgd(levels=32767)",
                 "threshold(threshold=0)", "threshold(threshold=1e30)", "powersgd(rank=4096)", "efsignsgd(block=1)"):  # fmt: skip
        grace(f"{text} + none")
    numbers = grace_ext.compressors.get("topk")(ratio=np.float32(0.5)), grace_ext.compressors.get("powersgd")(rank=np.int64(3))
    assert [type(n) for n in (numbers[0].ratio, numbers[1].rank)] == [float, int]


def test_unknown_and_superfluous_knobs():
    """The error names the unknown knobs and lists the valid ones."""
    for text, message in (
        ("topk(ration=0.1)", "topk: unknown knob ration; its knobs are ratio, values, index"),
        ("topk(0.1, 'fp32', 'auto', 3)", "topk: unknown knob 3; its knobs are"),
        ("topk(0.1, ratio=0.2)", "topk: knob ratio given twice"),
        ("none(1)", "none: unknown knob 1; it has no knobs"),
        ("fp16(bits=3)", "fp16: unknown knob bits; it has no knobs"),
        ("qsgd(bits=4, levels=7)", "bits or levels, not both"),
    ):
        with pytest.raises(ParameterError, match=message):
            grace(f"{text} + none")


def test_the_seed():
    """The seed is a whole number, given in the configuration or by keyword; the keyword takes precedence."""
    assert grace("none").seed == 0 and grace("none", seed=5).seed == 5
    assert grace(grace("none", seed=5)).seed == 5 and grace(grace("none", seed=5), seed=6).seed == 6
    for seed in ("1", 1.0, True, [1]):
        with pytest.raises(ParameterError, match="seed must be a whole number"):
            grace("none", seed=seed)


def test_impossible_mixes_name_the_way_out():
    """Payloads that cannot be summed, and rounds that a gather would drop, raise an error at once, with a communicator that fits."""
    for compressor in ("topk", "threshold", "qsgd", "efsignsgd"):
        with pytest.raises(IncompatiblePartsError, match=f"'{compressor}' payloads cannot be summed.*use communicator 'allgather'"):
            grace(f"{compressor} + none @ allreduce")
    for communicator in ("allgather", "broadcast"):
        with pytest.raises(IncompatiblePartsError, match=f"'powersgd' .*'{communicator}' would drop; use communicator 'allreduce'"):
            grace(f"powersgd + residual @ {communicator}")


def test_a_biased_compressor_without_memory_warns_once():
    """One warning names a fix; an explicit '+ none' or an unbiased compressor causes none."""
    making.warned.clear()
    with pytest.warns(BiasedCompressorWarning, match=r"topk\(ratio=0.37\) is biased.*topk\(ratio=0.37\) \+ residual") as caught:
        grace("topk(ratio=0.37)")
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grace("topk(ratio=0.37)")
        for text in ("topk(ratio=0.38) + none", "qsgd", "signsgd", "none", "fp16", "randomk(scale=True)", "topk(ratio=0.39) + residual"):
            grace(text)
        grace(grace("topk(ratio=0.41) + none"))
    for text in ("randomk", "efsignsgd", "threshold", "powersgd"):
        with pytest.warns(BiasedCompressorWarning, match=text):
            grace(text)


def test_warnings_are_given_on_rank_0_only(monkeypatch):
    """Other ranks would say the same; each still fails if warnings are errors, so that all ranks do alike."""
    monkeypatch.setenv("RANK", "1")
    calls = (lambda: grace("topk(ratio=0.34)"), lambda: grace("qsgd(bits=2, bucket=999) + residual"),
             lambda: from_params({"compressor": "topk", "memory": "residual"}),
             lambda: from_params({"compressor": "none", "momentum_factor": 0.9}))  # fmt: skip
    for call in calls:
        making.warned.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert not caught
    making.warned.clear()
    monkeypatch.setenv("RANK", "0")
    for call in calls:
        with pytest.warns(UserWarning) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_a_compressor_or_a_composition_is_a_spec():
    """grace() takes what it and its parts are made of; other parts, and configurations of something else, get an error with a way out."""
    topk, residual = grace_ext.compressors.get("topk"), grace_ext.memories.get("residual")
    g = grace("topk(ratio=0.2) + residual", seed=4)
    assert grace(g.route, seed=4) == g and grace(grace_ext.compressors.get("qsgd")(bits=4)) == grace("qsgd(bits=4)")
    making.warned.clear()
    with pytest.warns(BiasedCompressorWarning, match=r"topk\(ratio=0.36\) \+ residual"):
        grace(topk(ratio=0.36))
    with pytest.raises(SpecSyntaxError, match=r"residual is a memory, and a spec needs a compressor: grace\(compressor=..., memory=...\)"):
        grace(residual())
    with pytest.raises(SpecSyntaxError, match="unknown key 'compress_ratio', 3.*for GRACE's own parameters: grace_ext.from_params"):
        grace({"compressor": "topk", "compress_ratio": 0.1, 3: 4})


def quiet_params(**params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_params(params)


@pytest.mark.parametrize(("params", "meaning"), [
    ({"compressor": "topk", "memory": "residual", "communicator": "allgather", "compress_ratio": 0.3}, "topk(ratio=0.3) + residual"),
    ({"compressor": "powersgd", "memory": "residual", "communicator": "allreduce", "compress_rank": 3}, "powersgd(rank=3) + residual"),
    ({"compressor": "qsgd", "quantum_num": 127}, "qsgd(levels=127)"),
    ({"compressor": "threshold", "memory": "residual", "threshold": 0.5}, "threshold(threshold=0.5) + residual"),
    ({"compressor": "none", "compress_ratio": 0.3, "lr": 0.1, "world_size": 4, "momentum": 0.9}, "none"),
    ({"compressor": "fp16", "memory": "none", "communicator": "broadcast"}, "fp16 + none @ broadcast"),
    ({"compressor": "qsgd", "quantum_num": 64, "bucket_size": 128, "communicator": "alltoall"},
     "qsgd(levels=64, bucket=128) + none @ reduce_scatter"),
    ({"compressor": "qsgd_cuda", "quantum_num": 127, "bucket_size": 256}, "qsgd(levels=127, bucket=256)"),
    ({"compressor": "natural_cuda", "bucket_size": 128, "communicator": "alltoall", "world_size": 4}, "natural + none @ reduce_scatter"),
    ({"compressor": "topk", "compress_ratio": 0.3, "kernel": "rdxtopk_cuda", "memory": "residual"}, "topk(ratio=0.3) + residual"),
    ({"compressor": "topk", "compress_ratio": 0.3, "kernel": "cupy", "memory": "efsignsgd", "lr": 0.1}, "topk(ratio=0.3) + efsignsgd"),
    ({"compressor": "AdapSparse", "compress_ratio": 0.1}, "wangni(ratio=0.1)"),
    ({"compressor": "adapsparse", "compress_ratio": 0.1, "memory": "none", "communicator": "allgather"}, "wangni(ratio=0.1) @ allgather"),
])  # fmt: skip
def test_grace_parameters(params, meaning):
    """from_params reads GRACE's own dictionary; it ignores keys of unused parts, and lr and world_size, which are known from elsewhere."""
    assert quiet_params(**params) == grace(meaning)


def test_grace_parameters_that_are_wrong():
    for params, error, message in (
        ({"compressor": "topk", "ratio": 0.1}, ParameterError, "unknown key 'ratio' .*compress_ratio"),
        ({"memory": "residual"}, ParameterError, "need a 'compressor'"),
        ({"compressor": "topx"}, UnknownPartError, "topk"),
        ({"compressor": "topk", "memory": "residual", "compress_ratio": 5}, ParameterError, r"ratio must be a number in \(0, 1\]"),
        ({"compressor": "topk", "memory": "residual", "communicator": "allreduce"}, IncompatiblePartsError, "allgather"),
        ({"compressor": 5}, GraceError, "5"),
        ({"compressor": ["topk"]}, GraceError, "topk"),
    ):
        with pytest.raises(error, match=message):
            quiet_params(**params)


def test_missing_grace_parameters_are_said_once():
    """A missing ratio gets this package's default (0.01; GRACE's is 0.3), and one warning says so."""
    making.warned.clear()
    with pytest.warns(UserWarning, match=r"compressor topk: ratio=0.01") as caught:
        assert from_params({"compressor": "topk", "memory": "residual"}) == grace("topk(ratio=0.01) + residual")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_params({"compressor": "topk", "memory": "residual"})
        from_params({"compressor": "topk", "memory": "residual", "compress_ratio": 0.1})


def test_an_unbound_grace_names_the_right_import():
    """Horovod hashes or calls its compression object: both raise an error that says what to import instead."""
    g = grace("topk + residual")
    for call in (lambda: hash(g), lambda: {g}, lambda: g.compress(np.ones(3)), lambda: g.decompress(np.ones(3), None)):
        with pytest.raises(UnboundError) as caught:
            call()
        for words in ("import grace_ext.frameworks.torch as hvd", "import grace_ext.frameworks.tensorflow as hvd", "bind("):
            assert words in str(caught.value)
        assert isinstance(caught.value, TypeError)


def test_bind_refuses_what_is_no_model():
    for nothing in ([], (), {}, iter([])):
        with pytest.raises(UnboundError, match="no parameters"):
            grace("none").bind(nothing)
    with pytest.raises(UnboundError, match="builtins.int"):
        grace("none").bind([1, 2])


def test_errors_of_specs_with_line_breaks():
    """They say in which line; two lines are no two specs."""
    with pytest.raises(SpecSyntaxError, match=r"at line 2, column \d+\."):
        grace("topk\n+ residual(beta 0.5)\n@ allgather")
    for text in ("topk\nresidual", "topk,\nresidual", "topk)\n + (residual"):
        with pytest.raises(SpecSyntaxError):
            grace(text)
