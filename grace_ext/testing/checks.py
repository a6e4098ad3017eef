"""Checks that several contracts share: what one spec must do on simulated ranks, whatever kind of part is under test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

import grace_ext

from ..errors import IncompatiblePartsError
from ..parts.part import Part
from ..parts.registry import communicators, compressors, memories, policies
from . import inputs
from .worlds import LR, World, same_bits, states

#: Shapes of tensors for checks that need only a vector and a matrix.
SHAPES = {"a": (40,), "m": (24, 18)}
#: Shapes of tensors for checks of in-place results: small ones, which are merged, and one for which kernels work in pieces.
IN_PLACE = {"a": (40,), "b": (50,), "m": (24, 18), "large": (70, 90)}
#: Communicators that a part may be tested with beside its natural one.
BESIDE = ("", "@ allreduce", "@ allgather", "@ broadcast", "@ reduce_scatter", "@ sparse_allreduce", "@ hierarchical(between=allgather)")


def suite(name: str, *classes: tuple[type, str, Iterable[Any]]) -> type:
    """Returns a class that pytest collects. It holds each class of tests, parametrized: (class, names of arguments, their values)."""
    found = {}
    for cls, arguments, values in classes:
        mark = pytest.mark.parametrize(tuple(arguments.split(", ")) if ", " in arguments else arguments, list(values))
        found[f"Test{cls.__name__}"] = type(f"Test{cls.__name__}", (cls,), {"pytestmark": [mark]})
    return type(name, (), found)


def accepted(texts: Sequence[str], rest: str) -> list[str]:
    """Returns those of these compressors that can be composed with the rest of the spec ('+ memory', '+ none @ communicator'). Raises
    ValueError if there are none."""
    found = [compressor for compressor in texts if legal([f"{compressor} {rest}"])]
    if not found:
        raise ValueError(f"none of {', '.join(texts)} can be composed with {rest!r}, so this suite cannot test it")
    return found


def legal(specs: Iterable[str]) -> list[str]:
    """Returns those of these specs whose parts fit."""
    found = []
    for spec in specs:
        try:
            grace_ext.grace(spec)
        except IncompatiblePartsError:
            continue
        found.append(spec)
    return found


def check_shapes(world: World, spec: str, dtype: str) -> None:
    """Makes two steps of two ranks: results have the shapes and dtypes of the input, are finite, and have the same bytes on every rank
    (except for memories which declare that results differ)."""
    g = grace_ext.grace(spec)
    cluster = world.cluster(g, 2)
    for step in range(2):
        gradients = inputs.ranks(2, step, dtype)
        returned = world.everywhere(cluster, gradients)
        assert len(returned) == 2 and (g.diverges or same_bits(*returned))
        assert list(returned[0]) == list(gradients[0])
        for name, array in returned[0].items():
            assert array.shape == inputs.SHAPES[name] and array.dtype == gradients[0][name].dtype, name
            assert np.isfinite(array.astype(np.float64)).all(), name


def check_zeros(world: World, spec: str, shapes: dict[str, tuple[int, ...]] = inputs.SHAPES) -> None:
    """Checks that zero gradients give exact zeros, and leave no residual."""
    cluster = world.cluster(grace_ext.grace(spec), 2)
    zeros = [{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}] * 2
    for _ in range(2):
        out = world.step(cluster, zeros)
        assert not any(array.any() for array in out.values()), [name for name, array in out.items() if array.any()]
        assert not any(a.any() for held in states(cluster, world) for k, a in held.items() if k.startswith("residual/"))


def check_huge(world: World, spec: str, dtype: str = "float32", value: float = 3e38) -> None:
    """Checks that after gradients near the largest float the state is finite, and stays so."""
    cluster = world.cluster(grace_ext.grace(spec), 2)
    with np.errstate(all="ignore"):
        world.step(cluster, [{"m": np.full((24, 50), value, dtype)}] * 2)
        assert all(np.isfinite(a).all() for held in states(cluster, world) for a in held.values())
        world.step(cluster, inputs.ranks(2, 1, dtype, {"m": (24, 50)}))
    assert all(np.isfinite(a).all() for held in states(cluster, world) for a in held.values())


def check_no_view(world: World, spec: str) -> None:
    """Checks that a step does not change gradients, and that writing into them, or into the result, after it does not change the state."""
    clean, dirty = (world.cluster(grace_ext.grace(spec), 1) for _ in range(2))
    for step in range(3):
        tensors = world.tensors(inputs.ranks(1, step))
        expected = inputs.ranks(1, step)
        out = dirty.step(tensors, lr=LR)
        out = out[0] if isinstance(out, list) else out
        for name, tensor in tensors[0].items():
            assert np.array_equal(world.array(tensor), expected[0][name]), name
            if tensor.shape and world.mutable:  # a 0-d numpy result may be a scalar, which is read-only
                out[name][...] = 777.0
                tensor[...] = 555.0
        world.step(clean, expected, lr=LR)
        assert all(same_bits(a, b) for a, b in zip(states(clean, world), states(dirty, world), strict=True))


def check_in_place(world: World, spec: str) -> None:
    """Checks that results that are written over the gradients, as the torch wrapper does, and the state after them are those of a cluster
    that makes new arrays, bit for bit: also of tensors that are merged, and after NaN on one rank."""
    g = grace_ext.grace(spec)
    size, per_node = (4, 2) if g.two_level else (2, 1)
    runs = []
    for place in (lambda cluster: cluster, world.in_place):
        cluster, outs = place(world.cluster(g, size, per_node)), []
        for step in range(3):
            gradients = inputs.ranks(size, step, shapes=IN_PLACE)
            if step == 1:
                gradients[1]["m"][3, 4] = np.nan
            with np.errstate(all="ignore"):
                returned = world.everywhere(cluster, gradients)
            outs += [{name: array.copy() for name, array in out.items()} for out in returned]
        runs.append([*outs, *states(cluster, world)])
    for expected, got in zip(*runs, strict=True):
        assert same_bits(expected, got), [name for name in expected if expected[name].tobytes() != got[name].tobytes()]


def check_one_bad_rank(world: World, spec: str, size: int = 2) -> None:
    """Checks that with NaN on one rank, in one element, some, half or all of them, or on all ranks, all ranks return NaN and no state
    changes, and that the next step works as if these had not been made."""
    g = grace_ext.grace(spec)
    cluster = world.cluster(g, size)
    world.step(cluster, inputs.ranks(size, 0, shapes=SHAPES))
    held = states(cluster, world)
    for step, (share, those) in enumerate([(0, [1]), (0.05, [1]), (0.5, [1]), (1, [1]), (0.05, range(size)), (1, range(size))], 1):
        bad = inputs.ranks(size, step, shapes=SHAPES)
        for rank in those:
            bad[rank]["m"][np.random.default_rng([step, rank]).random(SHAPES["m"]) < share] = np.nan
            bad[rank]["m"][3, 4] = np.nan
        with np.errstate(all="ignore"):
            returned = world.everywhere(cluster, bad)
        assert all(np.isnan(out["m"]).all() for out in returned), (share, those)
        assert g.diverges or all(same_bits(out, returned[0]) for out in returned), (share, those)
        assert all(same_bits(a, b) for a, b in zip(held, states(cluster, world), strict=True)), (share, those)
    assert np.isfinite(world.step(cluster, inputs.ranks(size, 7, shapes=SHAPES))["m"]).all()


def check_resume(
    world: World,
    spec: str,
    size: int = 2,
    steps: int = 4,
    shapes: dict[str, tuple[int, ...]] = inputs.SHAPES,
    *,
    at: int = 2,
    gradients: Callable[[int], Any] | None = None,
) -> None:
    """Checks that a fresh cluster that loads the state after `at` steps continues exactly like the one that was saved, up to step `steps`.
    gradients: returns those of a step, by rank; by default normal ones of these shapes."""
    given = gradients or (lambda step: inputs.ranks(size, step, shapes=shapes))
    g = grace_ext.grace(spec)
    cluster, fresh = world.cluster(g, size), world.cluster(g, size)
    for step in range(at):
        world.step(cluster, given(step))
    fresh.load_state_dict(copy.deepcopy(cluster.state_dict()))
    for step in range(at, steps):
        assert same_bits(world.step(cluster, given(step)), world.step(fresh, given(step)))
        assert all(same_bits(a, b) for a, b in zip(states(cluster, world), states(fresh, world), strict=True))


def check_registered(part: Part, spec: str, again: Part) -> None:
    """Checks that the part is found by its name, that its spec survives JSON, that `again`, which was read from the part's own string, is
    equal, and that its docstring starts with a sentence."""
    g = grace_ext.grace(spec, seed=7)
    (registry,) = (r for r in (compressors, memories, communicators, policies) if r.kind == part.kind)
    assert registry.get(part.name) is type(part)
    assert grace_ext.grace(json.loads(json.dumps(g.to_config()))) == g
    assert again == part and hash(again) == hash(part)
    assert (type(part).__doc__ or "").strip().splitlines()[0].endswith(".")
