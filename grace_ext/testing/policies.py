"""Tests that every policy must pass. See `policy_contract`."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext

from ..composition.composition import Composition, Query
from ..parts.state import is_own
from ..parts.tensor import TensorSpec
from ..policies.base import Policy
from . import inputs
from .checks import check_registered, check_resume, suite
from .worlds import NUMPY, WITH_DEVICE, World, same_bits, states

SHAPES = {"embed.weight": (60, 40), "layer.0.weight": (24, 18), "layer.0.bias": (24,), "scale": (), "empty": (0, 3)}
STEPS = 6


def policy_contract(*texts: str) -> type:
    """Returns a class of tests for these policies, given by spec strings. Assign it to a name that begins with Test.

    The tests check: registration, configuration, that `choose` is pure and chooses among `leaves`, along `reached`; that all ranks choose
    alike at every step; shapes, dtypes of 16 to 64 bits, equal results on all ranks, the same bits in every tensor library, NaN on one
    rank, resuming; and that the policy's state lies under its own keys.
    """
    pairs = [pytest.param(w, t, id=f"{w.name}-{t}") for w in WITH_DEVICE for t in texts]
    return suite("TestPolicyContract", (Everywhere, "world, text", pairs), (Declared, "text", texts))


def specs() -> list[TensorSpec]:
    return [TensorSpec(name, shape) for name, shape in SHAPES.items()]


def policy_of(text: str) -> Policy:
    policy = grace_ext.grace(text).policy
    assert isinstance(policy, Policy), f"{text!r} is no policy"
    return policy


class Everywhere:
    """The tests that run in every tensor library."""

    def test_all_ranks_choose_alike(self, world: World, text: str):
        """At every step all ranks choose the same parts for each tensor, and results keep shape and dtype and have the same bytes."""
        cluster = world.cluster(grace_ext.grace(text), 2)
        for step in range(STEPS):
            gradients = inputs.ranks(2, step, shapes=SHAPES)
            returned = world.everywhere(cluster, gradients)
            chosen = [{name: tuple(map(str, parts)) for name, parts in driver.parts.items()} for driver in cluster.drivers]
            assert chosen[0] == chosen[1] and set(chosen[0]) == set(SHAPES)
            assert cluster.grace.diverges or same_bits(*returned)
            for name, array in returned[0].items():
                assert array.shape == SHAPES[name] and array.dtype == np.float32 and np.isfinite(array).all(), name

    def test_other_dtypes(self, world: World, text: str):
        """Gradients of float64 and of 16 bits keep shape and dtype, and results have the same bytes on every rank."""
        for dtype in ("float64", "float16", "bfloat16"):
            cluster = world.cluster(grace_ext.grace(text), 2)
            for step in range(3):
                gradients = inputs.ranks(2, step, dtype, SHAPES)
                returned = world.everywhere(cluster, gradients)
                assert cluster.grace.diverges or same_bits(*returned)
                for name, array in returned[0].items():
                    assert array.shape == SHAPES[name] and array.dtype == gradients[0][name].dtype, (name, dtype)
                    assert np.isfinite(array.astype(np.float64)).all(), (name, dtype)

    def test_the_same_as_numpy(self, world: World, text: str):
        """Results equal those of the reference, or are close to them if a compressor's bytes may differ; of a policy that goes by times, as
        long as both choose alike."""
        g = grace_ext.grace(text)
        exact, timed = all(leaf.compressor.deterministic_bytes for leaf in g.leaves), any(policy.timed for policy in g.policies)
        clusters = [(one, one.cluster(g, 2)) for one in (world, NUMPY)]
        for step in range(STEPS if exact else 2):
            ours, theirs = (one.step(cluster, inputs.ranks(2, step, shapes=SHAPES)) for one, cluster in clusters)
            if timed and clusters[0][1].drivers[0].parts != clusters[1][1].drivers[0].parts:
                break
            if exact:
                assert same_bits(ours, theirs)
            else:
                assert all(np.allclose(ours[n], theirs[n], rtol=1e-2, atol=1e-3) for n in theirs)

    def test_one_bad_rank(self, world: World, text: str):
        """With NaN on one of two ranks both return NaN, and no state changes, that of the policy included."""
        cluster = world.cluster(grace_ext.grace(text), 2)
        world.step(cluster, inputs.ranks(2, 0, shapes=SHAPES))
        held, bad = states(cluster, world), inputs.ranks(2, 1, shapes=SHAPES)
        bad[1]["layer.0.weight"][3, 4] = np.nan
        with np.errstate(all="ignore"):
            returned = world.everywhere(cluster, bad)
        assert all(np.isnan(out["layer.0.weight"]).all() for out in returned)
        assert all(same_bits(a, b) for a, b in zip(held, states(cluster, world), strict=True))

    def test_resume_is_bit_exact(self, world: World, text: str):
        """A fresh cluster that loads the state continues exactly like the one that was saved."""
        check_resume(world, text, steps=STEPS, shapes=SHAPES)


class Declared:
    """The tests of the policy itself."""

    def test_is_a_registered_value(self, text: str):
        """It is found by name, equal if its knobs are, and the same after a round trip through JSON and through its string."""
        policy = policy_of(text)
        check_registered(policy, text, policy_of(str(policy)))

    def test_it_chooses_among_what_it_declares(self, text: str):
        """`choose` is pure. It returns one of `leaves`, which `reached` yields for the tensor, and always the same one unless `changes`."""
        policy = policy_of(text)
        assert policy.leaves and all(isinstance(leaf, Composition) for leaf in policy.leaves)
        for spec in specs():
            reached = list(policy.reached(spec, "policy"))
            assert reached[0] == ("policy", policy)
            possible = [route for _, route in reached if isinstance(route, Composition)]
            assert set(possible) <= set(policy.leaves)
            chosen = []
            for step in (0, 1, 2, 99, 10_000):
                query = Query(spec, step, {})
                chosen.append(policy.choose(query))
                assert policy.choose(query) is chosen[-1] or policy.choose(query) == chosen[-1]
                assert chosen[-1] in possible or chosen[-1] in [leaf.dense_step for leaf in possible], f"{chosen[-1]} was not declared"
            assert policy.changes or len(set(chosen)) == 1, "what changes with the step must say `varies`"

    def test_its_state_lies_under_its_own_keys(self, text: str):
        """A policy that `learns` keeps its state under its own keys; others keep none."""
        g = grace_ext.grace(text)
        cluster = NUMPY.cluster(g, 2)
        NUMPY.step(cluster, inputs.ranks(2, 0, shapes=SHAPES))
        learnt = {key.split("/", 1)[0] for held in states(cluster, NUMPY) for key in held if is_own(key.split("/", 1)[0])}
        assert all(key.startswith("policy") for key in learnt)
        assert bool(learnt) <= any(policy.learns for policy in g.policies)

    def test_notices_are_text(self, text: str):
        """`notices` returns sentences for the log."""
        assert all(isinstance(sentence, str) and sentence for sentence in policy_of(text).notices(specs()))
