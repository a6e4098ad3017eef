"""Parts are values: they are registered, frozen, equal if their knobs are, and their configurations and texts read back as equal parts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import types
import warnings

import numpy as np
import pytest

import grace_ext
from grace_ext.communicators.base import Communicator
from grace_ext.compressors.base import Compressor
from grace_ext.compressors.forms.merged import Merged
from grace_ext.compressors.forms.sparse import AtPositions, Selecting
from grace_ext.compressors.forms.two_sided import TwoSided
from grace_ext.errors import BiasedCompressorWarning, GraceError
from grace_ext.frameworks.horovod import chosen_compression
from grace_ext.memories.base import Memory
from grace_ext.policies.base import Policy

from .. import catalog

KINDS = {
    "compressor": (Compressor, grace_ext.compressors),
    "memory": (Memory, grace_ext.memories),
    "communicator": (Communicator, grace_ext.communicators),
    "policy": (Policy, grace_ext.policies),
}


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(sub) for sub in cls.__subclasses__()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_package_is_registered_and_frozen(kind):
    """Every public subclass is registered by a name, is itself a frozen dataclass, and has a docstring and help for each knob."""
    base, package = KINDS[kind]
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    registered = {package.get(name) for name in package.names()}
    bases = {base, AtPositions, Selecting, TwoSided} | _subclasses(Merged)
    ours = [c for c in _subclasses(base) - bases if c.__module__.startswith("grace_ext.")]
    own = {c for c in ours if not c.__name__.startswith("_")}
    assert own and own <= registered
    for cls in own:
        assert "__dataclass_params__" in vars(cls) and cls.__dataclass_params__.frozen, cls
        assert cls.__doc__ and len(cls.__doc__) > 60 and not cls.__doc__.startswith(cls.__name__ + "("), cls
        assert package.get(cls.name) is cls
        assert all(field.metadata.get("help") for field in dataclasses.fields(cls)), cls
        assert cls.create() == cls() and isinstance(cls(), base)


@pytest.mark.parametrize("spec", catalog.ALL)
def test_configuration_round_trip(spec):
    """A Grace survives JSON, str, repr, and being passed to `grace`."""
    g = grace_ext.grace(spec, seed=7)
    written = json.loads(json.dumps(g.to_config()))
    again = grace_ext.grace(written)
    assert again == g and again.seed == 7 and again.to_config() == written
    assert grace_ext.grace(g) == g
    assert str(again) == str(g) and repr(again) == repr(g)
    with warnings.catch_warnings():  # str omits '+ none', so reading it back may warn that there is no memory
        warnings.simplefilter("ignore", BiasedCompressorWarning)
        assert grace_ext.grace(str(g), seed=7) == g
        assert eval(repr(g), {"grace": grace_ext.grace}) == g


@pytest.mark.parametrize("text", catalog.COMPRESSORS)
def test_parts_are_equal_by_value(text):
    """Parts with equal knobs are equal and have equal hashes; parts with other knobs, or other parts, are not equal."""
    a, b = (grace_ext.grace(f"{text} + none").compressor for _ in range(2))
    assert a is not b and a == b and hash(a) == hash(b)
    others = [grace_ext.grace(f"{other} + none").compressor for other in catalog.COMPRESSORS if other != text]
    assert a not in others
    for field in dataclasses.fields(a):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(a, field.name, getattr(a, field.name))


def test_grace_is_compared_by_value():
    """Graces are equal if parts and seed are; values of other types are not equal."""
    g = grace_ext.grace("topk(ratio=0.1) + residual")
    assert g == grace_ext.grace("topk(ratio=0.1) + residual @ allgather")
    assert g != grace_ext.grace("topk(ratio=0.1) + residual", seed=1)
    assert g != grace_ext.grace("topk(ratio=0.1) + none")
    assert g != grace_ext.grace("topk(ratio=0.1) + residual @ broadcast")
    assert g != "topk(ratio=0.1) + residual @ allgather" and g != None  # noqa: E711


def test_str_shows_what_differs_from_the_defaults():
    """str prints headline knobs always, and other knobs if they are not the default."""
    assert str(grace_ext.grace("topk(ratio=0.05, values='fp16') + residual(beta=0.9)")) == (
        "topk(ratio=0.05, values='fp16') + residual(beta=0.9) @ allgather"
    )
    assert str(grace_ext.grace("topk + none")) == "topk(ratio=0.01) @ allgather"
    assert str(grace_ext.grace("none")) == "none @ allreduce"


def test_natural_communicators():
    """The default is allreduce if payloads can be summed, otherwise allgather, for any world size."""
    summed = {"none", "fp16", "bf16", "randomk", "randblock", "powersgd", "powersgd_plus", "random_projection", "scaled_int"}
    for name in grace_ext.compressors.names():
        assert catalog.natural(name) == ("allreduce" if name in summed else "allgather"), name


def nested(depth):
    found = "topk + residual"
    for _ in range(depth):
        found = {"id": "by_size", "large": found}
    return {"policy": found}


@pytest.mark.parametrize("value", [False, {}, "", 0, 0.0, [], ()], ids=repr)
@pytest.mark.parametrize("kind", ["memory", "communicator"])
def test_a_value_that_stands_for_nothing_is_no_part(kind, value):
    """YAML's `no` for a memory must not compose a biased compressor without one, and without a warning."""
    for given in ({kind: value}, {"spec": {"compressor": "topk", kind: value}}):
        with pytest.raises(GraceError):
            grace_ext.grace(**{"compressor": "topk"} if "spec" not in given else {}, **given)
    with pytest.raises(GraceError, match="write 'none', or leave it out"):
        grace_ext.grace(compressor="topk", memory=False)


@pytest.mark.parametrize("kind", ["memory", "communicator", "policy"])
def test_arrays_are_no_parts(kind):
    with pytest.raises(GraceError, match=f"a {kind} must be a name"):
        grace_ext.grace(**{"compressor": "topk"} if kind != "policy" else {}, **{kind: np.zeros(3)})


def test_choices_become_values_of_the_parts_own():
    """A knob with choices takes equal values of other types, and keeps the declared one."""
    for g in (grace_ext.grace("scaled_int(width=16.0)"), grace_ext.grace({"compressor": {"id": "scaled_int", "width": np.int64(16)}})):
        assert g == grace_ext.grace("scaled_int(width=16)") and type(g.compressor.width) is int
        grace_ext.LocalCluster(g, 2).step([{"w": np.ones(100, np.float32)}] * 2)
    g = grace_ext.grace({"compressor": {"id": "topk", "values": np.str_("fp16")}, "memory": "residual"})
    assert grace_ext.grace(str(g)) == g == grace_ext.grace(json.loads(json.dumps(g.to_config())))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"compressor": {"id": "qsgd", "bits": 10**5000}}, "bits"),
        ({"compressor": {"id": "topk", "ratio": "x" * 9999}}, "ratio"),
        ({"compressor": {"id": "topk", "q" * 9999: 1}}, "knob"),
        ({"compressor": {"id": "z" * 9999}}, "compressor"),
        ({"k" * 9999: 1, 2: 3}, "key"),
        ("topk + " + "y" * 9999, "memory"),
        ("topk ! " + "y" * 9999, "cannot read"),
        ("topk(ratio=" + "9" * 4000 + ")", "ratio"),
        ({"compressor": "topk", "seed": 10**5000}, "seed"),
        ({"compressor": "topk", "seed": "7" * 9999}, "seed"),
        (nested(300), "nested too deeply"),
        (np.zeros(10_000), "a spec is"),
        ("topk\ud800", "cannot read"),
        ({10**5000: 1}, "key"),
        ({"compressor": {"id": "topk", 10**5000: 1}}, "knob"),
        ({"compressor": {"id": "topk", **{f"knob{i}": i for i in range(5000)}}}, "knob0"),
        ("topk(" + "0.1, " * 5000 + ")", "knob"),
        ("by_name({'" + "x" * 9999 + "': none, '" + "x" * 9999 + "': none})", "twice"),
        ({"policy": {"id": "by_name", "patterns": {"x" * 9999: ["a" * 9999]}}}, "patterns"),
        ({"policy": {"id": "by_name", "patterns": {1: "none", "a": "none", None: "none"}}}, "patterns"),
        ({"policy": {"id": "by_name", "patterns": ""}}, "patterns"),
        ({"policy": {"id": "auto", "candidates": []}}, "candidates"),
        ({"policy": {"id": "auto", "candidates": {"topk + residual": 1}}}, "candidates"),
    ],
    ids=range(23),
)
def test_errors_name_the_key_and_are_short(given, key):
    """Whatever was given, the error is ours, says what it is about, and repeats at most 200 characters of it."""
    with pytest.raises(GraceError, match=key) as raised:
        grace_ext.grace(given)
    assert len(str(raised.value)) < 650


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (False, "dictionary"),
        ("topk", "dictionary"),
        ({"compressor": 10**5000}, "compressor"),
        ({"compressor": "topk", "memory": 10**5000}, "memory"),
        ({"compressor": "topk", "memory": False}, "memory"),
        ({"compressor": "topk", "x" * 9999: 1, 3: 4, None: 2, 10**5000: 1}, "unknown key"),
        ({"compressor": "topk", "compress_ratio": 10**5000}, "ratio"),
        ({"compressor": "inceptionn", "error_bound": 10**5000}, "error_bound"),
        ({"compressor": "inceptionn", "error_bound": float("inf")}, "error_bound"),
        ({"compressor": "inceptionn", "error_bound": "x" * 9999}, "error_bound"),
        ({"compressor": "signum", "momentum_factor": np.zeros(3)}, "momentum"),
    ],
    ids=range(11),
)
def test_errors_about_grace_parameters_do_so_too(given, key):
    """`from_params` keeps to the same."""
    with pytest.raises(GraceError, match=key) as raised:
        grace_ext.from_params(given)
    assert len(str(raised.value)) < 650


def test_numpys_numbers_and_strings_are_pythons():
    g = grace_ext.grace({"policy": {"id": "by_name", "patterns": {np.str_("a"): "none"}}}, seed=np.int64(3))
    assert type(g.seed) is int and grace_ext.grace(str(g), seed=3) == g == grace_ext.grace(json.loads(json.dumps(g.to_config())))


@pytest.mark.parametrize("value", [False, True, 0, [], (), 10**5000, "x" * 9999, np.zeros(3), object()], ids=range(9))
def test_compression_and_framework(value):
    """Every wrapper reads `compression=` in the same way."""
    theirs = types.SimpleNamespace(none=None, fp16=object())
    for call in (lambda: chosen_compression(value, theirs), lambda: grace_ext.LocalCluster("none", 2, framework=value)):
        with pytest.raises(GraceError) as raised:
            call()
        assert len(str(raised.value)) < 650
