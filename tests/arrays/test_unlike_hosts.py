"""Ranks on unlike hosts do not drift apart: of what they receive, all array libraries, with kernels and without, make the same results.

A run with kernels records what all ranks handed to the collectives. The runs of the other libraries hand over the same, as if a rank of
theirs were among the recorded ones: then their results must have the same bits, and so must the state that ranks share.
"""

from __future__ import annotations

from fractions import Fraction
from unittest import mock

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays import kernels
from grace_ext.compressors import demo, lqsgd
from grace_ext.compressors.forms import lowrank
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, WORLDS, same_bits, states, tapped

from .. import catalog

OTHERS = [w for w in WORLDS if w.name in ("numpy-plain", "torch-device", "tensorflow")]
SHAPES = {"wide": (7, 131), "tall": (65, 9), "kernel": (32, 3, 5, 5), "vector": (300,)}
LOW_RANK = ("powersgd", "powersgd(feedback='mean')", "powersgd_plus(refresh_period=2)", "powersgd_plus(refresh_period=2, refresh='gram')",
            "lqsgd", "atomo")  # fmt: skip


def gradients(step: int, size: int = 3) -> list[dict[str, np.ndarray]]:
    """Returns gradients of which a matrix has a low rank, so that columns of P depend on others."""
    made = inputs.ranks(size, step, shapes=SHAPES)
    for each in made:
        each["tall"][:, 2:] = each["tall"][:, :1]
    return made


def shared(cluster, world):
    """Returns what rank 0 keeps and shares with the others."""
    keys = set(grace_ext.compressors.get(cluster.grace.compressor.name).create().shared_state)
    return {key: array for key, array in states(cluster, world)[0].items() if key.partition("/")[0] in keys}


def recorded(g) -> tuple[list, list]:
    """Returns (what was handed to each collective, by rank; results and shared state of each step), with kernels."""
    cluster, outs, arrays = NUMPY.cluster(g, 3), [], []

    def keep(collectives, ops):
        arrays.append([np.array(ops.host(c.array)) for c in collectives])
        return collectives

    with tapped(keep):
        for step in range(3):
            outs += [NUMPY.step(cluster, gradients(step)), shared(cluster, NUMPY)]
    return arrays, outs


def replayed(g, world, arrays) -> list:
    """Returns results and shared state of each step in this world, whose ranks hand over the recorded arrays instead of their own."""
    cluster, outs, given = world.cluster(g, 3), [], iter(arrays)

    def replace(collectives, ops):
        mine = [ops.upload(array.copy()) for array in next(given)]
        return [c._replace(array=array) for c, array in zip(collectives, mine, strict=True)]

    kernels_here = mock.patch.object(kernels, "enabled", lambda: world.name == "tensorflow")  # for what looks at no array library
    with tapped(replace), kernels_here:
        for step in range(3):
            outs += [world.step(cluster, gradients(step)), shared(cluster, world)]
    assert not list(given)
    return outs


def check(spec: str) -> None:
    g = grace_ext.grace(spec)
    arrays, outs = recorded(g)
    for world in OTHERS:
        for ours, theirs in zip(replayed(g, world, arrays), outs, strict=True):
            assert same_bits(ours, theirs), world.name


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7, 8, 16, 31, 32])
@pytest.mark.parametrize("name", LOW_RANK)
def test_products_of_any_rank(name, rank):
    text = f"{name[:-1]}, rank={rank})" if name.endswith(")") else f"{name}(rank={rank})"
    check(f"{text} + residual")


@pytest.mark.parametrize("spec", [s for s in catalog.shelf() if "hierarchical" not in s])
def test_every_part(spec):
    check(spec)


@pytest.mark.parametrize("spec", ["demo(sign=True)", "demo(chunk=8, values='fp16')", "demo(chunk=64, topk=9)", "lqsgd(bits=16)"])
def test_other_knobs(spec):
    check(f"{spec} + residual")


@pytest.mark.parametrize("columns", [1, 2, 5, 33])
@pytest.mark.parametrize("rows", [1, 4, 33, 2048, 2049, 5000])
def test_orthonormal_columns(rows, columns):
    """P has the same bits with kernels and without, if columns depend on others or are zero, too; and is orthonormal."""
    matrix = np.random.default_rng([rows, columns]).standard_normal((rows, columns)).astype(np.float32)
    matrix[:, columns // 2 :: 4] = matrix[:, :1]
    found = []
    for enabled in (True, False):
        with mock.patch.object(kernels, "enabled", lambda enabled=enabled: enabled):
            found.append(lowrank.orthonormalize(matrix))
    assert found[0].tobytes() == found[1].tobytes()
    gram = found[0].astype(np.float64).T @ found[0]
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6 and (np.abs(np.diag(gram) - (np.diag(gram) > 0.5)) < 1e-6).all()


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inner", [0, 1, 3, 4, 5, 8, 17, 32])
def test_one_order_of_additions(world, dtype, inner):
    """`product` rounds every product and every sum, one after the other, here computed one by one."""
    random = np.random.default_rng(inner)
    a, b = random.standard_normal((6, inner)).astype(dtype), random.standard_normal((inner, 37)).astype(dtype)
    wanted = np.zeros((6, 37), dtype)
    for i in range(6):
        for j in range(37):
            for r in range(inner):
                wanted[i, j] += a[i, r] * b[r, j]
    found = np.array(world.ops.host(world.ops.product(world.ops.upload(a), world.ops.upload(b))))
    assert found.dtype == dtype and found.tobytes() == wanted.tobytes()


def test_functions_that_all_ranks_evaluate_are_rounded_once():
    """Tables by which all ranks decode are the nearest floats, by another way of computing; a C library's functions may not be."""
    table = lqsgd.values(3.0, 2)  # ((1 + 3) ** (level / 2) - 1) / 3
    assert table.tolist() == [-1.0, -float(Fraction(1, 3)), 0.0, float(Fraction(1, 3)), 1.0]
    assert demo.cosines(1).tolist() == [[1.0]] and demo.cosines(3)[2, 1] == -np.sqrt(2 / 3) and demo.cosines(3)[1, 1] == 0
