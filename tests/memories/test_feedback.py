"""Error feedback conserves: sent values and residual add up to the compensated gradient, in the precision of the wire."""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

import grace_ext
from grace_ext.exchange import bucket, tensor
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, World, states

from .. import catalog

ULP = 2.0**-24
Arrays = dict[str, np.ndarray]


class Sent(NamedTuple):
    """Arguments of one call of a memory's `after`, for one tensor of one rank in one step."""

    name: str
    rank: int
    compensated: np.ndarray
    values: np.ndarray
    positions: np.ndarray | None
    aggregate: np.ndarray
    omega: float | None


# The law of each memory: how the compensated gradient and the new state follow from the old state, the gradient, the learning rate and the
# sent values. law(memory, old state, gradient, lr, Sent) -> (compensated gradient, new state by key), in float64. Every memory needs a law.
def _residual(memory, old, g, lr, sent):
    p = memory.beta * old["residual"] + memory.gamma * g
    return p, {"residual": p - sent.values}


def _none(memory, old, g, lr, sent):
    return g, {}


def _powersgd(memory, old, g, lr, sent):
    return (old["residual"] + g, {"residual": old["residual"] + g - sent.values}) if "residual" in old else (g, {})


def _efsignsgd(memory, old, g, lr, sent):
    p = old["update_residual"] + lr * g
    return p, {"update_residual": p - sent.values}


def _ef_star(memory, old, g, lr, sent):
    p = old["residual"] + g - old["shift"]
    return p, {"residual": p - sent.values, "shift": old["shift"]}


def _masked(momentum, sent):
    kept = momentum.copy()
    if sent.positions is not None:
        kept[sent.positions] = 0
    return kept


def _dgc(memory, old, g, lr, sent):
    if memory.clipping:
        return None  # depends on the other tensors: see test_oracles_memories.py
    u = memory.momentum * old["own_momentum"] + g
    p = old["residual"] + (g + memory.momentum * u if memory.nesterov else u)
    return p, {"residual": p - sent.values, "own_momentum": _masked(u, sent) if memory.masking else u}


def _update_compression(memory, old, g, lr, sent):
    m = memory.momentum * old["own_momentum"] + g
    p = old["residual"] + g + (memory.momentum * m if memory.nesterov else m)
    return p, {"residual": p - sent.values, "own_momentum": _masked(m, sent) if memory.masking else m}


def _gradient_compression(memory, old, g, lr, sent):
    p = old["residual"] + g
    return p, {"residual": p - sent.values, "momentum": memory.momentum * old["momentum"] + sent.aggregate}


def _momentum_compression(memory, old, g, lr, sent):
    p = memory.momentum * old["sent_momentum"] + g + old["residual"]
    return p, {"residual": p - sent.values, "sent_momentum": sent.aggregate}


def _ef21(memory, old, g, lr, sent):
    return g - old["ef21_estimate"], {
        "ef21_estimate": old["ef21_estimate"] + sent.values,
        "ef21_mean": old["ef21_mean"] + sent.aggregate,
    }


def _ef21_sgdm(memory, old, g, lr, sent):
    v = memory.momentum * old["ef21_momentum"] + (1 - memory.momentum) * g
    return v - old["ef21_estimate"], {"ef21_momentum": v, **_ef21(memory, old, g, lr, sent)[1]}


def _diana(memory, old, g, lr, sent):
    alpha = 1 / (1 + sent.omega) if memory.alpha is None or sent.omega == 0 else memory.alpha
    return g - old["diana_shift"], {
        "diana_shift": old["diana_shift"] + alpha * sent.values,
        "diana_mean": old["diana_mean"] + alpha * sent.aggregate,
    }


def _cser(memory, old, g, lr, sent):
    if memory.reset_period == 1:
        return None  # the reset comes on top: see test_oracles_memories.py
    return g, {"cser_residual": old["cser_residual"] + lr * (g - sent.values)}


def _dist_ef_block(memory, old, g, lr, sent):
    before = old["residual_rate"][0]
    state = {"residual_rate": np.array([lr])}
    if memory.momentum:
        state["own_momentum"] = memory.momentum * old["own_momentum"] + g
        g = g + memory.momentum * state["own_momentum"] if memory.nesterov else state["own_momentum"]
    p = g + (before / lr if before else 1.0) * old["rated_residual"]
    return p, {**state, "rated_residual": p - sent.values}


LAWS = {
    "none": _none, "residual": _residual, "powersgd": _powersgd, "efsignsgd": _efsignsgd, "ef_star": _ef_star, "dgc": _dgc,
    "update_compression": _update_compression, "gradient_compression": _gradient_compression, "ef21": _ef21, "ef21_sgdm": _ef21_sgdm,
    "diana": _diana, "cser": _cser, "dist_ef_block": _dist_ef_block, "momentum_compression": _momentum_compression,
}  # fmt: skip


def test_every_memory_has_a_law():
    """Every registered memory is tested here."""
    assert set(grace_ext.memories.names()) == set(LAWS)


class Recorder:
    """Records the calls of a memory's `after` by wrapping it. One-pass forms of memory and compressor, which do not call it, are turned
    off; the tests of kernels show that they give the same."""

    def __init__(self, memory, ops):
        self.calls: list[Sent] = []
        original = type(memory).after

        def after(part, ops_, compensated, sent, spec, info, state):
            arrays = (np.array(ops.host(x)) for x in (compensated, sent.values()))
            positions = None if sent.positions() is None else np.array(ops.host(sent.positions()))
            aggregate = np.array(ops.host(sent.aggregate))
            self.calls.append(Sent(spec.name, info.rank, *arrays, positions, aggregate, sent.compressor.omega(spec.size)))
            return original(part, ops_, compensated, sent, spec, info, state)

        self._after = mock.patch.object(type(memory), "after", after)

    @contextmanager
    def watching(self):
        no_kernels = mock.patch.object(tensor, "compiled", lambda *_: None), mock.patch.object(bucket, "merge", lambda *_: None)
        with self._after, no_kernels[0], no_kernels[1]:
            yield


def _exact(g, dtype: str) -> bool:
    """Whether the residual is representable in float32."""
    unscaled = not getattr(g.compressor, "scale", False)
    return g.compressor.name in catalog.EXACT_VALUES and unscaled and dtype != "float64"


def of_parameter(state: Arrays, name: str) -> Arrays:
    """Returns the state of one parameter, as {key: float64 array}."""
    return {key.split("/", 1)[0]: a.astype(np.float64) for key, a in state.items() if key.split("/", 1)[1] == name}


def check_law(world: World, spec: str, dtype: str, shapes, steps: int) -> None:
    g = grace_ext.grace(spec)
    memory, size, law = g.memory, 2, LAWS[g.memory.name]
    cluster = world.cluster(g, size)
    held: list[Arrays] = [{} for _ in range(size)]
    for step in range(steps):
        gradients, lr = inputs.ranks(size, step, dtype, shapes), 0.125 * 2.0**-step
        recorder = Recorder(memory, world.ops)
        with recorder.watching():
            world.step(cluster, gradients, lr)
        after = states(cluster, world)
        for sent in recorder.calls:
            old, new = of_parameter(held[sent.rank], sent.name), of_parameter(after[sent.rank], sent.name)
            old = old or {key: np.zeros_like(array) for key, array in new.items()}
            grad = gradients[sent.rank][sent.name].astype(np.float64).reshape(-1)
            check_values(g, dtype, law(memory, old, grad, lr, sent), old, new, grad, sent)
        checked = {(sent.name, sent.rank) for sent in recorder.calls}
        assert checked == {(name, rank) for name, shape in shapes.items() if 0 not in shape for rank in range(size)}
        held = after


def check_values(g, dtype: str, expected, old: Arrays, new: Arrays, grad: np.ndarray, sent: Sent) -> None:
    """Asserts that the compensated gradient and the new state follow the law, up to float32 rounding of the terms, and that sent values and
    residual add up to the compensated gradient, exactly if that is representable."""
    compensated, values = sent.compensated.astype(np.float64), sent.values.astype(np.float64)
    # A product of matrices is subtracted without being stored, which rounds differently.
    product = 0.0 if g.compressor.deterministic_bytes else 4 * ULP * sum(np.abs(a).max(initial=0) for a in (compensated, values))
    if expected is not None:
        p, state = expected
        own = [a for key, a in old.items() if a.size == grad.size and not key.startswith(("powersgd", "lqsgd", "shard"))]
        slack = 16 * ULP * (sum(np.abs(a) for a in own) + np.abs(grad) + np.abs(values) + np.abs(sent.aggregate)) + 1e-43 + product
        assert (np.abs(compensated - p) <= slack).all(), (sent.name, sent.rank)
        for key, wanted in state.items():
            assert (np.abs(new[key] - wanted) <= (slack if wanted.size == slack.size else 1e-12)).all(), (key, sent.name, sent.rank)
    if g.memory.unsent_key in new and g.memory.name != "cser":
        error = values + new[g.memory.unsent_key] - compensated
        limit = 0.0 if _exact(g, dtype) else ULP * np.abs(compensated - values) + 1e-44 + product
        assert (np.abs(error) <= limit).all(), (sent.name, sent.rank)


@pytest.mark.parametrize("world", [NUMPY], ids=["numpy"])
@pytest.mark.parametrize("spec", [s for s in catalog.ALL if "+ residual" in s])
def test_conservation_in_float32(world, spec):
    """g + r_old == sent + r_new over several steps, for every compressor and communicator."""
    check_law(world, spec, "float32", inputs.SHAPES, steps=3)


@pytest.mark.parametrize("world", [NUMPY], ids=["numpy"])
@pytest.mark.parametrize("dtype", list(inputs.DTYPES)[1:])
@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_conservation_in_other_dtypes(world, spec, dtype):
    """Half-precision gradients keep a float32 residual; a float64 gradient is conserved to float32 rounding of what is kept."""
    check_law(world, spec, dtype, inputs.SHAPES, steps=2)


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_conservation_of_a_large_tensor(spec):
    """The same holds for a tensor with many blocks and pieces."""
    shape = (500, 200) if grace_ext.grace(spec).compressor.rounds else (100_000,)
    check_law(NUMPY, spec, "float32", {"big": shape}, steps=2)


@pytest.mark.parametrize("spec", catalog.FEEDBACK)
def test_what_is_remembered_as_sent_is_what_arrives(world, spec):
    """A single rank gets exactly what its memory counts as sent; otherwise feedback would correct the wrong error."""
    g = grace_ext.grace(spec)
    cluster = world.cluster(g, 1)
    for step in range(2):
        recorder = Recorder(g.memory, world.ops)
        with recorder.watching():
            out = world.step(cluster, inputs.ranks(1, step))
        assert recorder.calls
        for call in recorder.calls:
            name, sent = call.name, call.values
            got = out[name].reshape(-1)
            if g.compressor.name == "signsgd" and g.compressor.ties == "plus":
                assert np.array_equal(got[sent != 0], sent[sent != 0])
            elif g.compressor.result == "signs":
                assert np.array_equal(got, np.sign(sent)), name  # the signs of what was sent
            elif g.compressor.rounds:
                assert np.allclose(got, sent, rtol=1e-5, atol=1e-6)  # computed by one product of matrices, or by two
            else:
                assert np.array_equal(got, sent), name


OTHERS = [s for s in catalog.ALL if grace_ext.grace(s).memory.name not in ("none", "residual")]


@pytest.mark.parametrize("spec", OTHERS)
def test_the_other_memories_keep_their_laws(spec):
    """The laws hold over several steps with a changing learning rate, for every compressor that the memory takes."""
    check_law(NUMPY, spec, "float32", inputs.SHAPES, steps=3)


@pytest.mark.parametrize("dtype", list(inputs.DTYPES)[1:])
@pytest.mark.parametrize("memory", [m for m in catalog.MEMORIES if m not in ("none", "residual")])
def test_the_other_memories_in_other_dtypes(memory, dtype):
    check_law(NUMPY, one_spec(memory), dtype, inputs.SHAPES, steps=2)


def one_spec(memory: str) -> str:
    """Returns a spec with this memory and a compressor that it takes."""
    return next(s for s in catalog.ALL if f" + {memory} @" in s)


@pytest.mark.parametrize("memory", catalog.MEMORIES)
def test_states_are_flat_and_float32(world, memory):
    """For every gradient dtype, states are named <key>/<parameter>, with the keys and lengths of `init`."""
    g = grace_ext.grace(one_spec(memory))
    for dtype in inputs.DTYPES:
        cluster = world.cluster(g, 2)
        world.step(cluster, inputs.ranks(2, 0, dtype))
        for rank, held in enumerate(states(cluster, world)):
            expected = {}
            for name, spec in cluster.drivers[rank].specs.items():
                start = g.memory.init(world.ops, spec, cluster.drivers[rank].step_info()) if spec.size else {}
                expected.update({f"{key}/{name}": len(array) for key, array in start.items()})
            own = {key: array for key, array in held.items() if not key.startswith(("powersgd_q", "shard"))}
            assert {key: array.size for key, array in own.items()} == expected
            assert all(array.dtype == np.float32 and array.ndim == 1 for array in held.values())
