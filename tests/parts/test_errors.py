"""Input that does not fit a LocalCluster raises an error at once; it says what is wrong and where, and nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext import LocalCluster, errors
from grace_ext.errors import GraceError, NamesError, ParameterError, PayloadError, TensorChangedError, UnsupportedDtypeError
from grace_ext.testing.worlds import same_bits


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


def cluster(spec: str = "topk(ratio=0.5) + residual", size: int = 2) -> LocalCluster:
    return LocalCluster(grace_ext.grace(spec), size)


def test_every_error_is_a_grace_error():
    """Every error is a GraceError and, if Python has one of that kind, also the built-in error."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception) and not issubclass(c, Warning)]
    assert len(classes) > 8 and all(issubclass(c, GraceError) for c in classes)
    kinds = {"UnknownPartError": KeyError, "ParameterError": ValueError, "SpecSyntaxError": ValueError, "NamesError": ValueError,
             "IncompatiblePartsError": ValueError, "UnboundError": TypeError, "TensorChangedError": ValueError,
             "UnsupportedDtypeError": TypeError, "DisagreementError": RuntimeError, "PayloadError": RuntimeError}  # fmt: skip
    assert all(issubclass(getattr(errors, name), kind) for name, kind in kinds.items())


def test_payload_errors_keep_their_data():
    error = PayloadError("is odd").at(3, "layer/w")
    assert (error.reason, error.rank, error.parameter) == ("is odd", 3, "layer/w")
    assert str(error) == "payload of rank 3 for 'layer/w': is odd" and str(PayloadError("is odd")) == "payload: is odd"


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", None, True])
def test_sizes(size):
    with pytest.raises(ParameterError, match="size must be a whole number"):
        LocalCluster(grace_ext.grace("none"), size)


def test_an_unknown_framework():
    with pytest.raises(ParameterError, match="numpy.*torch.*got 'jax'"):
        LocalCluster(grace_ext.grace("none"), 1, framework="jax")


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "complex64", "complex128"])
def test_dtypes_that_are_no_gradients(dtype):
    """The first step rejects them and names the parameter; the cluster can still be used."""
    c = cluster()
    with pytest.raises(UnsupportedDtypeError, match=f"'w' is {dtype}; only floating point"):
        c.step([{"w": ones(3, dtype=dtype)}] * 2)
    c.step([{"w": ones(3)}] * 2)


def test_one_mapping_a_rank():
    for count in (0, 1, 3):
        with pytest.raises(ParameterError, match=f"2 ranks, got {count}"):
            cluster().step([{"w": ones(3)}] * count)


def test_missing_and_unknown_names():
    """At the first step and later, the error states the rank and the names."""
    c = cluster()
    with pytest.raises(NamesError, match=r"rank 1: missing parameters \['b'\], unknown parameters \['c'\]"):
        c.step([{"a": ones(3), "b": ones(3)}, {"a": ones(3), "c": ones(3)}])
    c.step([{"a": ones(3), "b": ones(3)}] * 2)
    with pytest.raises(NamesError, match=r"rank 0: missing parameters \['a'\], unknown parameters \[\]"):
        c.step([{"b": ones(3)}, {"a": ones(3), "b": ones(3)}])
    with pytest.raises(NamesError, match=r"unknown parameters \['new'\]"):
        c.step([{"a": ones(3), "b": ones(3), "new": ones(3)}] * 2)


@pytest.mark.parametrize(("changed", "words"), [
    (ones(4), r"was float32\[3\] and is now float32\[4\]"), (ones(3, 1), r"now float32\[3, 1\]"), (ones(), r"now float32\[\]"),
    (ones(3, dtype="float64"), r"now float64\[3\]"), (ones(3, dtype="float16"), r"now float16\[3\]"),
    (ones(3, dtype="int32"), r"now int32\[3\]"),
])  # fmt: skip
def test_a_tensor_that_changes(changed, words):
    """A tensor with a new shape or dtype, on any rank, raises an error before anything has changed."""
    c, clean = cluster(), cluster()
    for one in (c, clean):
        one.step([{"v": ones(5), "w": ones(3)}] * 2)
    for rank in (0, 1):
        gradients = [{"v": ones(5), "w": ones(3)} for _ in range(2)]
        gradients[rank]["w"] = changed
        with pytest.raises(TensorChangedError, match=f"'w' {words}" if words.startswith("was") else words):
            c.step(gradients)
    for _ in range(2):
        assert same_bits(c.step([{"v": ones(5), "w": ones(3)}] * 2), clean.step([{"v": ones(5), "w": ones(3)}] * 2))


def test_ranks_that_differ_at_the_first_step():
    """After the error nothing has changed: another first step may follow, with other shapes and names."""
    c = cluster()
    with pytest.raises(TensorChangedError):
        c.step([{"w": ones(3)}, {"w": ones(4)}])
    with pytest.raises(TensorChangedError):
        c.step([{"w": ones(3)}, {"w": ones(3, dtype="float64")}])
    assert c.step([{"other": ones(4)}] * 2)["other"].shape == (4,)


def test_an_empty_mapping_and_an_empty_tensor():
    """A model without parameters sends nothing, nor does one whose only parameter is empty."""
    c = cluster()
    assert c.step([{}, {}]) == {} and c.wire_bytes == [0, 0]
    c = cluster()
    assert c.step([{"w": ones(0, 3)}] * 2)["w"].shape == (0, 3) and c.wire_bytes == [0, 0]


def test_the_order_of_a_mapping_does_not_matter():
    """Ranks may fill their mappings in any order."""
    c, clean = cluster(), cluster()
    a, b = ones(5) * 2, ones(3, 4)
    for _ in range(2):
        got = c.step([{"a": a, "b": b}, {"b": b, "a": a}])
        assert same_bits(got, clean.step([{"a": a, "b": b}] * 2))


def test_lists_and_python_numbers_are_refused_or_read_but_never_misread():
    """Plain Python values become what numpy makes of them: floats are float64, ints are rejected."""
    assert cluster("none").step([{"w": [1.0, 2.0]}] * 2)["w"].tolist() == [1.0, 2.0]
    with pytest.raises(UnsupportedDtypeError):
        cluster("none").step([{"w": [1, 2]}] * 2)
