"""state_dict and load_state_dict resume bit for bit, copy everything, and reject a state that does not fit without changing anything."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import GraceError
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states

from .. import catalog

SHAPES = {"a": (40,), "layer/with/slashes": (24, 18), "empty": (0, 3)}


def after(world, spec: str, steps: int, size: int = 2):
    cluster = world.cluster(grace_ext.grace(spec), size)
    for step in range(steps):
        world.step(cluster, inputs.ranks(size, step, shapes=SHAPES))
    return cluster


@pytest.mark.parametrize("world", [NUMPY], ids=["numpy"])
@pytest.mark.parametrize("spec", catalog.MIXES)
def test_resume_is_bit_exact(world, spec):
    """A new cluster, and one that had trained differently, continue exactly like the saved cluster."""
    cluster = after(world, spec, 2)
    saved = cluster.state_dict()
    fresh, elsewhere = world.cluster(grace_ext.grace(spec), 2), after(world, spec, 3)
    for other in (fresh, elsewhere):
        other.load_state_dict(copy.deepcopy(saved))
    for step in (2, 3)[: 2 if world is NUMPY else 1]:
        gradients = inputs.ranks(2, step, shapes=SHAPES)
        expected = world.step(cluster, gradients)
        for other in (fresh, elsewhere):
            assert same_bits(world.step(other, gradients), expected)
            assert all(same_bits(a, b) for a, b in zip(states(cluster, world), states(other, world), strict=True))
    assert saved["ranks"][0]["step"] == 2


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(
    "spec",
    [
        "by_size(min_elements=100, large=dgc(ratio=0.1) + dgc)",
        "by_size(min_elements=100, large=topk(ratio=0.1) + gradient_compression)",
        "by_size(min_elements=100, large=ratio_warmup(steps=3))",
        "by_size(min_elements=100, small=none @ allgather, large=every(n=2, then=none, otherwise=topk(ratio=0.1) + residual))",
        "by_name({'a': none}, default=topk(ratio=0.1) + update_compression)",
        "by_name({'a': warmup(steps=2, then=topk(ratio=0.5) + dgc)}, default=by_name({'e*': none}, default=topk(ratio=0.1) + dgc))",
    ],
)
def test_tensors_that_keep_the_momentum_of_others(spec, steps):
    """Tensors that a policy sends dense keep the momentum that the others have; such a state is loaded, too."""
    cluster, fresh = after(NUMPY, spec, steps), NUMPY.cluster(grace_ext.grace(spec), 2)
    fresh.load_state_dict(cluster.state_dict())
    for step in range(steps, steps + 3):
        gradients = inputs.ranks(2, step, shapes=SHAPES)
        assert same_bits(NUMPY.step(cluster, gradients), NUMPY.step(fresh, gradients))


def test_a_state_that_does_not_fit_is_told_after_the_clean_up():
    """The first step of a cluster that loaded another model's state says what does not fit, not what came of forgetting it."""
    cluster, fresh = after(NUMPY, "topk(ratio=0.1) + residual", 1), NUMPY.cluster(grace_ext.grace("topk(ratio=0.1) + residual"), 2)
    fresh.load_state_dict(cluster.state_dict())
    with pytest.raises(GraceError, match="there are: other"):
        NUMPY.step(fresh, inputs.ranks(2, 1, shapes={"other": (40,)}))


def test_state_dicts_are_copies(world):
    """Neither a saved nor a loaded state shares memory with a running cluster."""
    cluster, same = after(world, "topk(ratio=0.1) + residual", 2), after(world, "topk(ratio=0.1) + residual", 2)
    saved = cluster.state_dict()
    loaded = copy.deepcopy(saved)
    same.load_state_dict(loaded)
    for dictionary in (saved, loaded):
        for rank in dictionary["ranks"]:
            for array in rank["state"].values():
                array[...] = 1e6
    gradients, reference = inputs.ranks(2, 2, shapes=SHAPES), after(world, "topk(ratio=0.1) + residual", 3)
    for one in (cluster, same):
        world.step(one, gradients)
        assert all(same_bits(a, b) for a, b in zip(states(one, world), states(reference, world), strict=True))


def refused(change, *, spec: str = "topk(ratio=0.1) + residual", match: str | None = None) -> None:
    """Asserts that loading a changed state raises GraceError and leaves the cluster as it was."""
    cluster = after(NUMPY, spec, 2)
    held, step = states(cluster, NUMPY), cluster.drivers[0].step
    saved = copy.deepcopy(after(NUMPY, spec, 3).state_dict())
    saved = change(saved) or saved
    with pytest.raises(GraceError, match=match):
        cluster.load_state_dict(saved)
    assert all(same_bits(a, b) for a, b in zip(held, states(cluster, NUMPY), strict=True))
    assert [driver.step for driver in cluster.drivers] == [step] * 2


def test_another_spec_is_refused():
    """The message has both specs."""
    refused(lambda saved: after(NUMPY, "topk(ratio=0.2) + residual", 1).state_dict(), match=r"ratio=0\.2.*ratio=0\.1")


def test_another_number_of_ranks_is_refused():
    refused(lambda saved: after(NUMPY, "topk(ratio=0.1) + residual", 1, size=3).state_dict(), match="3 ranks.* 2")


def test_another_version_is_refused():
    refused(lambda saved: saved["ranks"][0].update(version=99), match="99")


def test_a_bad_state_of_a_later_rank_changes_no_rank():
    refused(lambda saved: saved["ranks"][1].update(version=99))


def test_an_unknown_parameter_is_refused():
    def change(saved):
        for rank in saved["ranks"]:
            rank["state"]["residual/other"] = np.zeros(40, np.float32)

    refused(change, match="other")


def test_another_shape_is_refused():
    """A residual of the wrong length is rejected; it would fail in the middle of a step, or be broadcast."""

    def change(saved):
        for rank in saved["ranks"]:
            rank["state"]["residual/a"] = rank["state"]["residual/a"][:1]

    refused(change, match="'?a'?")


def test_a_state_for_other_parameters_is_refused_before_the_first_step_too():
    """A new cluster does not know its parameters when it loads; its first step raises."""
    cluster = NUMPY.cluster(grace_ext.grace("topk(ratio=0.1) + residual"), 2)
    cluster.load_state_dict(after(NUMPY, "topk(ratio=0.1) + residual", 2).state_dict())
    with pytest.raises(GraceError):
        NUMPY.step(cluster, inputs.ranks(2, 0, shapes={"another": (40,)}))
