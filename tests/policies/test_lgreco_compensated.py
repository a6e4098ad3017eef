"""Tests L-GreCo's errors of compensated gradients: by an independent simulation of top-k with error feedback in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import IncompatiblePartsError
from grace_ext.parts.tensor import TensorSpec
from grace_ext.testing.checks import check_resume
from grace_ext.testing.worlds import NUMPY

from .test_lgreco import settings

SHAPES = {"steady": (120, 90), "noise": (60, 50), "small": (30,)}
EVERY, WINDOW, RATIO = 6, 3, 0.05
SPEC = f"lgreco(every={EVERY}, window={WINDOW}, base=topk(ratio={RATIO}) + residual, choices=8, low=0.2, high=5, measure=compensated)"


def gradients(step):
    """Returns gradients of 2 ranks: 'steady' points the same way at every step, so that its residual grows; 'noise' does not."""
    made = []
    for rank in range(2):
        draw, always = np.random.default_rng([step, rank]), np.random.default_rng(rank)
        made.append({
            "steady": 0.3 * always.standard_normal(SHAPES["steady"]) + 0.05 * draw.standard_normal(SHAPES["steady"]),
            "noise": draw.standard_normal(SHAPES["noise"]) ** 3,
            "small": draw.standard_normal(SHAPES["small"]),
        })  # fmt: skip
    return [{name: array.astype(np.float32) for name, array in mapping.items()} for mapping in made]


def count(ratio: float, name: str) -> int:
    return max(1, math.ceil(ratio * math.prod(SHAPES[name]) - 1e-9))


def largest(x: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(x)
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    out[kept] = x[kept]
    return out


class Simulation:
    """Two ranks of top-k with error feedback, whose ratios follow L-GreCo with tables of the sum of g + e, all in float64."""

    def __init__(self, values: tuple[float, ...], dense: dict[str, list[bool]], sizes: dict[str, list[int]]):
        self.values, self.dense, self.sizes = values, dense, sizes
        self.choice = dict.fromkeys(SHAPES, values.index(RATIO))
        self.residual = {name: np.zeros((2, math.prod(shape))) for name, shape in SHAPES.items()}
        self.sums = {name: 0.0 for name in SHAPES}
        self.step = 0

    def __call__(self, by_rank):
        means = {}
        for name in SHAPES:
            p = self.residual[name] + np.stack([g[name].reshape(-1).astype(np.float64) for g in by_rank])
            if self.step % EVERY >= EVERY - WINDOW:
                self.sums[name] = (0.0 if self.step % EVERY == EVERY - WINDOW else self.sums[name]) + p
            if self.dense[name][self.choice[name]]:
                sent = p
            else:
                sent = np.stack([largest(x, count(self.values[self.choice[name]], name)) for x in p])
            self.residual[name] = p - sent
            means[name] = sent.mean(axis=0).reshape(SHAPES[name])
        self.step += 1
        if self.step % EVERY == 0:
            self.choice = self.decided()
        return means

    def decided(self):
        errors = {}
        for name in SHAPES:
            ordered = np.sort(np.abs(self.sums[name]), axis=1)[:, ::-1]
            lost = [float(np.linalg.norm(ordered[:, count(v, name) :], axis=1).mean()) for v in self.values]
            errors[name] = [0.0 if d else e for d, e in zip(self.dense[name], lost, strict=True)]
        budget = sum(of_name[self.values.index(RATIO)] for of_name in errors.values())
        steps = {name: [math.ceil(e / (budget / 10_000)) if e else 0 for e in of_name] for name, of_name in errors.items()}

        def cost(numbers):
            return tuple(sum(table[n][i] for n, i in zip(SHAPES, numbers, strict=True)) for table in (self.sizes, steps))

        every = itertools.product(range(len(self.values)), repeat=len(SHAPES))
        return dict(zip(SHAPES, min((c for c in every if cost(c)[1] <= 10_000), key=cost), strict=True))


def simulation(policy) -> Simulation:
    specs = {name: TensorSpec(name, shape) for name, shape in SHAPES.items()}
    dense = {name: [leaf.parts_for(spec)[0].name == "none" for leaf in policy.leaves] for name, spec in specs.items()}
    return Simulation(policy.values, dense, {name: [leaf.nbytes(spec) for leaf in policy.leaves] for name, spec in specs.items()})


def test_decisions_follow_gradients_plus_residuals(world):
    """For 4 decisions, choices and results equal those of the simulation; the errors of gradients alone decide otherwise."""
    cluster, seen, plain = world.cluster(grace_ext.grace(SPEC), 2), [], []
    expected = simulation(cluster.grace.policy)
    raw = world.cluster(grace_ext.grace(SPEC.replace("compensated", "gradient")), 2)
    for step in range(4 * EVERY + 1):
        means = expected(gradients(step))
        for by_rank in world.everywhere(cluster, gradients(step)):
            assert all(np.abs(by_rank[name] - mean).max() < 1e-5 for name, mean in means.items()), step
        world.step(raw, gradients(step))
        assert settings(cluster)[0] == settings(cluster)[1] == expected.choice, step
        seen.append(expected.choice)
        plain.append(settings(raw)[0])
    assert seen[EVERY] != seen[0] and seen != plain


MEMORIES = ["residual", "residual(beta=0.9, gamma=0.5)", "efsignsgd", "dgc", "momentum_compression", "gradient_compression",
            "update_compression", "powersgd", "dist_ef_block(momentum=0.9)"]  # fmt: skip


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_is_measured_is_what_is_compressed(memory):
    """With every memory of error feedback, the sum of the window is the sum of what the compressor was given."""
    compressed = []
    cluster = NUMPY.cluster(grace_ext.grace(f"lgreco(every=9, window=3, base=topk(ratio=0.1) + {memory}, measure=compensated)"), 2)
    for step in range(8):
        for number, driver in enumerate(cluster.drivers):
            if step > 5:
                given = {}
                for name in SHAPES:
                    kept, g = driver.state[name], gradients(step)[number][name].reshape(-1)
                    parts, info = driver.parts[name], driver.step_info()
                    given[name] = given_to(parts[1], driver.ops, g, driver.specs[name], info, kept)
                compressed.append((step, number, given))
        NUMPY.step(cluster, gradients(step))
    for number, driver in enumerate(cluster.drivers):
        for name in SHAPES:
            total = sum(x[name] for _, rank, x in compressed if rank == number)
            found = np.asarray(driver.ops.host(driver.state[name]["policy:sum"]), np.float64)
            assert np.abs(found - total).max() <= 1e-5 * max(1.0, np.abs(total).max()), (name, memory)


def given_to(memory, ops, grad, spec, info, state) -> np.ndarray:
    """Returns in float64 what the memory hands to the compressor: what its exchange sends."""
    given = []

    class Enough(Exception):
        pass

    def send(x):
        given.append(np.asarray(ops.host(x), np.float64).copy())
        raise Enough

    steps = memory.exchange(ops, send, grad, spec, info, state)
    with pytest.raises(Enough):
        next(steps)
    return given[0]


@pytest.mark.parametrize("at", [4, 9])
def test_resuming(world, at):
    """A fresh cluster that loads the state, in the middle of a window for example, continues bit for bit through decisions."""
    check_resume(world, SPEC, steps=at + 2 * EVERY, at=at, gradients=gradients)


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (
            "qsgd(bits=4)",
            "memory 'none' adds nothing of that kind; use a memory with error feedback, such as 'residual', or",
        ),
        ("topk(ratio=0.01) + ef21", "memory 'ef21' adds nothing of that kind"),
        ("qsgd(bits=4) + diana", "memory 'diana' adds nothing"),
        ("topk(ratio=0.01) + cser", "memory 'cser' adds nothing"),
        ("topk(ratio=0.01) + dgc(clipping=1.0)", "clips it by the norm of the whole model; leave out clipping"),
        ("topk(ratio=0.01) + residual @ hierarchical", "a residual belongs to the gradients of a whole node"),
    ],
)
def test_where_there_is_no_residual_to_add_it_is_refused(base, match):
    with pytest.raises(IncompatiblePartsError, match=match):
        grace_ext.grace(f"lgreco(base={base}, measure=compensated)")
    if "cser" not in base:
        assert grace_ext.grace(f"lgreco(base={base})").policy.measure == "gradient"


def test_two_levels_anywhere_in_a_policy_are_refused():
    with pytest.raises(IncompatiblePartsError, match="a flat communicator"):
        grace_ext.grace(f"by_size(small=none @ hierarchical, large={SPEC})")


def test_a_tensor_that_has_another_memory_now_is_measured_by_that():
    """Within accordion a tensor goes through the memory of `low` in calm times: what is measured there is what is compressed there."""
    spec = f"accordion(high={SPEC}, low=topk(ratio=0.01) + none, interval=1, threshold=1e6)"
    cluster = NUMPY.cluster(grace_ext.grace(spec), 2)
    for _ in range(EVERY - 1):
        NUMPY.step(cluster, gradients(0))
    for rank, driver in enumerate(cluster.drivers):
        assert driver.parts["steady"][1].name == "none" and driver.state["steady"]["residual"].any()
        for name in SHAPES:
            total = driver.state[name]["policy.high:sum"]
            assert np.abs(total - 2 * gradients(0)[rank][name].reshape(-1)).max() < 1e-5
