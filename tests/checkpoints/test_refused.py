"""States that cannot be loaded: told at loading, by rank, parameter and key, with nothing changed, however the cluster stands."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.checkpoints.resize import resized
from grace_ext.errors import CheckpointError, GraceError, NamesError
from grace_ext.local.cluster import LocalSGDCluster
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, same_bits, states

from . import bad_states
from .test_checkpoint import bits
from .test_checkpoint_ranks import assert_all_said, on_all

SHAPES = {"a": (40,), "layer/with/slashes": (24, 18), "empty": (0, 3)}
TOPK = "topk(ratio=0.1) + residual"
MANY = {**bad_states.FORM, **bad_states.FIT, **bad_states.WHOLE}


def after(spec: str, steps: int, size: int = 2, world=NUMPY):
    cluster = world.cluster(grace_ext.grace(spec), size)
    for step in range(steps):
        world.step(cluster, inputs.ranks(size, step, shapes=SHAPES))
    return cluster


def host(saved: dict, world) -> dict:
    """Returns a cluster's state with numpy arrays."""
    ranks = [{**state, "state": {key: np.array(world.ops.host(x)) for key, x in state["state"].items()}} for state in saved["ranks"]]
    return {**saved, "ranks": ranks}


def uploaded(state: dict, world) -> dict:
    """Returns a rank's state with arrays of this world, where that is possible."""

    def one(value):
        good = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype in (np.dtype("f4"), np.dtype("f8"))
        return world.ops.upload(value) if good else value

    arrays = state.get("state")
    return {**state, "state": {key: one(x) for key, x in arrays.items()}} if isinstance(arrays, dict) else state


def refused(cluster, saved, text: str, world=NUMPY) -> None:
    """Asserts that loading says this, and changes nothing."""
    before, steps = states(cluster, world), [driver.step for driver in cluster.drivers]
    with pytest.raises(GraceError) as told:
        cluster.load_state_dict(saved)
    assert text in str(told.value), told.value
    assert all(same_bits(a, b) for a, b in zip(before, states(cluster, world), strict=True))
    assert [driver.step for driver in cluster.drivers] == steps


@pytest.mark.parametrize("name", MANY)
def test_a_bad_state_is_told_by_rank_parameter_and_key(name, world):
    """It is rank 1's. Rank 0, whose state is good, does not change, either."""
    saved = host(after(TOPK, 3, world=world).state_dict(), world)
    ((_, bad, text),) = bad_states.of(saved["ranks"][1], {name: MANY[name]}, "layer/with/slashes")
    whole = {**saved, "ranks": [uploaded(state, world) for state in (saved["ranks"][0], bad)]}
    refused(after(TOPK, 2, world=world), whole, text, world)
    fresh = world.cluster(grace_ext.grace(TOPK), 2)
    if name in bad_states.FORM:
        refused(fresh, whole, text, world)
        with pytest.raises(GraceError, match="^rank 1: "):
            fresh.load_state_dict(whole)
    else:  # the parameters are not known yet: the first step says it
        fresh.load_state_dict(whole)
        with pytest.raises(GraceError) as told:
            world.step(fresh, inputs.ranks(2, 3, shapes=SHAPES))
        assert text in str(told.value)


@pytest.mark.parametrize("saved", [*bad_states.NOTHING, {"version": 1, "ranks": [{}, {}]}, {"version": 1, "ranks": [None, None]}], ids=repr)
def test_what_is_no_state_is_told(saved):
    refused(after(TOPK, 2), saved, "")
    refused(NUMPY.cluster(grace_ext.grace(TOPK), 2), saved, "")


def test_arrays_of_another_library_are_told():
    torch = pytest.importorskip("torch")
    saved = after(TOPK, 2).state_dict()
    for state in saved["ranks"]:
        state["state"] = {key: torch.from_numpy(x) for key, x in state["state"].items()}
    refused(after(TOPK, 1), saved, "of 'a' is a torch.Tensor, but this exchange keeps numpy.ndarray")


def test_ranks_at_different_steps_are_told():
    saved = after(TOPK, 3).state_dict()
    saved["ranks"][1]["step"] = 2
    refused(after(TOPK, 1), saved, "steps [2, 3]")
    saved = after(TOPK, 3).state_dict()
    saved["ranks"].reverse()
    refused(after(TOPK, 1), saved, "rank order")


def test_a_state_without_any_memory_is_that_of_skipped_steps():
    """Steps with an Inf count, and leave nothing: such a state is complete. With one parameter's memory it must have all."""
    cluster = NUMPY.cluster(grace_ext.grace(TOPK), 2)
    bad = [{name: np.full(shape, np.inf, np.float32) for name, shape in SHAPES.items()}] * 2
    NUMPY.step(cluster, bad)
    saved = cluster.state_dict()
    assert saved["ranks"][0]["step"] == 1 and saved["ranks"][0]["state"] == {}
    other = after(TOPK, 2)
    other.load_state_dict(saved)
    assert same_bits(NUMPY.step(other, inputs.ranks(2, 1, shapes=SHAPES)), NUMPY.step(cluster, inputs.ranks(2, 1, shapes=SHAPES)))
    saved = after(TOPK, 2).state_dict()
    for state in saved["ranks"]:
        state["state"] = {key: x for key, x in state["state"].items() if not key.endswith("/a")}
    refused(other, saved, "'a' lacks 'residual'")


POLICY = "lgreco(every=2, window=1, base=topk(ratio=0.1) + residual)"


@pytest.mark.parametrize(
    ("key", "value"), [("setting", 99.0), ("setting", np.nan), ("setting", np.inf), ("setting", -99.0)], ids=lambda value: str(value)
)
def test_a_choice_that_a_policy_does_not_have_is_told(key, value):
    """Loaded in the middle of training, such a number would end a later step on every rank."""
    saved = after(POLICY, 3).state_dict()
    for state in saved["ranks"]:
        state["state"][f"policy:{key}/a"][...] = value
    refused(after(POLICY, 1), saved, f"the state of 'a' has {{'policy:{key}': [")


def test_sums_of_a_policy_may_overflow():
    """lgreco takes sums that are not finite for not measured; such a state can be loaded."""
    saved = after("lgreco(every=9, window=9)", 3).state_dict()
    for state in saved["ranks"]:
        assert len(state["state"]["policy:sum/a"]) == 40
        state["state"]["policy:sum/a"][3] = np.nan
    cluster = after("lgreco(every=9, window=9)", 1)
    cluster.load_state_dict(saved)
    for step in range(3, 12):
        out = NUMPY.step(cluster, inputs.ranks(2, step, shapes=SHAPES))
    assert all(np.isfinite(x).all() for x in out.values())


@pytest.mark.parametrize("key", ["setting", "sum"])
def test_a_policy_that_lacks_what_it_has_learnt(key):
    saved = after(POLICY, 3).state_dict()
    for state in saved["ranks"]:
        del state["state"][f"policy:{key}/a"]
    refused(after(POLICY, 1), saved, f"'a' lacks 'policy:{key}'")


@pytest.mark.parametrize("name", ["NaN", "two dimensions", "float64", "too short", "a key too many"])
def test_one_rank_with_a_bad_file_tells_all_ranks(tmp_path, name):
    """The files' digests are right; what is in one of them is not. Nothing changes on any rank."""
    three, one = after(TOPK, 3), after(TOPK, 1)
    grace_ext.save(three, tmp_path / "good")
    bad_states.damage(tmp_path / "good", tmp_path / "bad", 1, MANY[name][0])
    holders, outcomes = on_all([one] * 2, lambda holder, rank: grace_ext.load(holder, tmp_path / "bad"))
    assert_all_said(outcomes, "rank 1: ", "'a'")
    assert "rank 0: " not in str(outcomes[0])
    assert [holder.bits() for holder in holders] == bits(one)
    with pytest.raises(CheckpointError, match="rank 1: .*'a'"):
        grace_ext.load(one, tmp_path / "bad")
    if name in bad_states.FORM:
        with pytest.raises(CheckpointError, match="'a'"):
            grace_ext.load(after(TOPK, 1, 3), tmp_path / "bad")  # on another number of ranks


def test_bad_states_cannot_be_resized():
    good = after(TOPK, 2).state_dict()["ranks"]
    for name, bad, text in bad_states.of(good[1], {k: v for k, v in bad_states.FORM.items() if k not in ("NaN", "Inf")}, "a"):
        with pytest.raises(GraceError) as told:
            resized([good[0], bad], 3)
        assert text in str(told.value) or "not of one exchange" in str(told.value), name
    for nothing in bad_states.NOTHING:
        with pytest.raises(GraceError):
            resized([nothing], 3)


# --- local-update training ----------------------------------------------------------------------------------------------
def trained_locally() -> LocalSGDCluster:
    cluster = LocalSGDCluster(TOPK, 2, every=2, outer_lr=0.7, outer_momentum=0.9)
    models = [{name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}] * 2
    cluster.start(models)
    for step in range(4):
        cluster.gradients([{name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}] * 2)
        moved = inputs.ranks(2, step, shapes=SHAPES)
        models = cluster.step([{name: x - 0.1 * g[name] for name, x in m.items()} for m, g in zip(models, moved, strict=True)])
    return cluster


MASTER = {
    "a list": (lambda arrays: arrays.update({"master/a": arrays["master/a"].tolist()}), "'master' of 'a' is a list"),
    "NaN": (lambda arrays: arrays.update({"master/a": arrays["master/a"] * np.nan}), "'master' of 'a' has NaN"),
    "float64": (lambda arrays: arrays.update({"master/a": np.float64(arrays["master/a"])}), "a is (40, 'float64')"),
    "too short": (lambda arrays: arrays.update({"master/a": arrays["master/a"][1:]}), "a is (39, 'float32')"),
    "too few": (lambda arrays: arrays.pop("master/a") is None, "another model: a"),
    "too many": (lambda arrays: arrays.update({"master/b": arrays["master/a"]}), "another model: b"),
    "another kind": (lambda arrays: arrays.update({"mistress/a": arrays["master/a"]}), "'mistress' of 'a'"),
    "no master copy": (lambda arrays: [arrays.pop(key) for key in list(arrays) if key.startswith("master/")], "lacks the master copy"),
    "no momentum of one": (lambda arrays: arrays.pop("outer/a") is None, "outer momentum is of another model: a"),
    "a momentum too short": (lambda arrays: arrays.update({"outer/a": arrays["outer/a"][1:]}), "outer momentum is of another model: a"),
}


@pytest.mark.parametrize("name", MASTER)
def test_a_bad_master_copy_is_told(name):
    change, text = MASTER[name]
    model = trained_locally().models[0]
    saved = trained_locally().models[1].state_dict()
    before = model.state_dict()
    change(saved["arrays"])
    with pytest.raises((GraceError, NamesError)) as told:
        model.load_state_dict(saved)
    assert text in str(told.value), told.value
    after_it = model.state_dict()
    assert same_bits(before.pop("arrays"), after_it.pop("arrays")) and before == after_it


def test_what_is_no_model_is_told():
    model = trained_locally().models[0]
    for saved in (*bad_states.NOTHING, {**model.state_dict(), "step": 1.5}, {**model.state_dict(), "last": None}):
        with pytest.raises(GraceError):
            model.load_state_dict(saved)
