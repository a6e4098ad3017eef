"""Arrays in the other byte order ('>f8' on most machines), as from netCDF, FITS or HDF5 files, count by values, not by bytes."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays.libraries import ops_for_framework
from grace_ext.checkpoints import statefile
from grace_ext.driver.agreement import digest_of
from grace_ext.errors import NamesError
from grace_ext.testing.worlds import WORLDS, same_bits

#: float64 holds these, float32 does not.
PRECISE = [1 + 2.0**-40, 1e300, -1e-300]


def swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("text", ["none", "topk(ratio=0.3) + residual", "qsgd(bits=4)", "powersgd + residual", "fp16"])
def test_the_same_results_and_states(world, text, dtype):
    ours, native = (world.cluster(grace_ext.grace(text), 2) for _ in range(2))
    for step in range(2):
        rng = np.random.default_rng(step)
        given = [{"w": rng.standard_normal((20, 3)).astype(dtype)} for _ in range(2)]
        theirs = native.step(given)
        got = ours.step([{"w": swapped(given[0]["w"])}, given[1]])
        a, b = (world.array(out["w"]) for out in (got, theirs))
        assert a.dtype == b.dtype == dtype and a.tobytes() == b.tobytes()
    states = [[driver.state_dict() for driver in cluster.drivers] for cluster in (ours, native)]
    assert str(states[0]) == str(states[1])


@pytest.mark.parametrize("framework", sorted({world.name.partition("-")[0] for world in WORLDS}))
def test_float64_keeps_its_precision(framework):
    out = grace_ext.LocalCluster("none", 2, framework).step([{"w": np.array(PRECISE, ">f8")}] * 2)["w"]
    assert np.asarray(out).dtype == np.float64 and (np.asarray(out) == PRECISE).all()


def test_copies_are_native():
    """States that were saved elsewhere are loaded by copies."""
    copy = ops_for_framework("numpy").copy(np.array(PRECISE, ">f8"))
    assert copy.dtype == np.float64 and (copy == PRECISE).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "complex128"])
def test_digests_are_of_values(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    assert digest_of(swapped(array)) == digest_of(array) != digest_of(swapped(array) + 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "uint16", "complex64"])
def test_files_hold_values(dtype):
    array = (np.arange(6).reshape(2, 3) + 0.5).astype(dtype)
    found = statefile.decode(statefile.encode({"state": {"a": swapped(array), "b": array}}))["state"]
    assert same_bits({"a": found["a"], "b": found["b"]}, {"a": array, "b": array})


@pytest.mark.parametrize("name", [0, ("a", 1), None, b"w"])
def test_names_that_are_no_strings(name):
    """They are refused before anything is sent, with the way out; the cluster can then be used."""
    cluster = grace_ext.LocalCluster("none", 2)
    with pytest.raises(NamesError, match=r"must be strings, got .*str\(\.\.\.\)"):
        cluster.step([{name: np.ones(3, np.float32)}] * 2)
    cluster.step([{"w": np.ones(3, np.float32)}] * 2)
    with pytest.raises(NamesError, match=r"must be strings, got .* in place 2"):
        cluster.step([{"w": np.ones(3, np.float32), "v": np.ones(3, np.float32), name: np.ones(3, np.float32)}] * 2)
