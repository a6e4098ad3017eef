"""Runs random mixes of parts for a short time with fixed seeds; benchmarks/reliability/mix_fuzz.py runs many more. Also tests that the
fuzzer finds faults, and makes their cases small."""

from __future__ import annotations

import warnings
from collections import Counter
from unittest import mock

import numpy as np
import pytest

from benchmarks.reliability.mix_case import Bad, Case, Tensor, gradients
from benchmarks.reliability.mix_check import check
from benchmarks.reliability.mix_draw import a_case
from benchmarks.reliability.mix_shrink import failure, shrunk
from grace_ext.exchange import lockstep
from grace_ext.memories.residual import Residual
from grace_ext.parts.ops import Feedback

#: Properties that some of the cases must have checked.
SEEN = (
    "equal on all ranks", "finite states", "finite results", "not finite: all NaN", "not finite: states kept", "bytes within their bound",
    "inputs unchanged", "shape and dtype", "shared state equal", "conservation", "resume", "path 'plain'", "path 'in place'",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("part", range(8))
def test_random_mixes(part):
    tally: Counter[str] = Counter()
    for seed in range(80 * part, 80 * (part + 1)):
        found = failure(a_case(seed, tally), tally)
        assert found is None, f"python benchmarks/reliability/mix_fuzz.py --case {seed}: {found.text}"
    assert all(tally[name] > 0 for name in SEEN), [name for name in SEEN if not tally[name]]
    assert tally["refused"] > 0 and tally["round trip"] == 80


def test_a_case_is_the_same_at_every_draw():
    for seed in range(50):
        assert repr(a_case(seed, Counter())) == repr(a_case(seed, Counter()))


PLAIN = Case("topk(ratio=0.25) + residual @ allgather", (Tensor("w", (40,)), Tensor("größe", (24, 18), kind="sparse")), size=3, steps=4)


def test_a_memory_that_loses_something_is_found_and_made_small():
    """A residual that forgets a tenth: conservation does not hold, and two elements on one rank show it."""
    plain = Residual.feedback

    def forgets(self, state):
        found = plain(self, state)
        return Feedback(found.residual, found.beta * 0.9, found.gamma)

    with mock.patch.object(Residual, "feedback", forgets):
        found = failure(PLAIN)
        assert found and found.kind == "conservation: topk + residual @ allgather"
        small = shrunk(found, 10).case
        assert (small.size, len(small.tensors), small.steps, small.path) == (1, 1, 2, "") and np.prod(small.tensors[0].shape) <= 3
    assert failure(small) is None  # without the fault it holds


def test_a_policy_is_made_smaller_to_the_part_that_fails():
    spec = "by_size(min_elements=10, small=none, large=every(n=2, then=qsgd(bits=4), otherwise=topk(ratio=0.5, index='packed') + residual))"

    def fails(self, ops, compensated, sent, spec, info, state):
        raise KeyError("planted")

    with mock.patch.object(Residual, "after", fails), mock.patch.object(Residual, "feedback", lambda self, state: None):
        with mock.patch.object(Residual, "before", lambda self, ops, grad, spec, info, state: grad + state["residual"]):
            found = failure(Case(spec, PLAIN.tensors, 2, steps=4, path="plain", load_at=2))
            assert found and found.kind == "KeyError in fuzz/test_mixes_fuzz.py: fails"
            small = shrunk(found, 10).case
    assert small.spec.startswith("none + residual") and (small.size, small.steps, small.load_at, small.path) == (1, 1, None, "")


def test_ranks_that_drift_apart_are_found():
    plain = lockstep.execute

    def drifts(collectives, ops):
        results = plain(collectives, ops)
        if collectives[0].kind == "allreduce":
            results[-1] = results[-1].copy()
            results[-1][0] += 1
        return results

    with mock.patch.object(lockstep, "execute", drifts):
        found = failure(Case("fp16 + residual", PLAIN.tensors, 3))
    assert found and found.kind == "equal on all ranks"


def test_values_that_are_not_finite_are_where_they_should_be():
    case = Case("none", (Tensor("w", (100,)), Tensor("m", (7, 3), "bfloat16")), size=3, bad=Bad(step=1, tensor=1, share=0.5, rank=2))
    finite = [[{name: bool(np.isfinite(a).all()) for name, a in mapping.items()} for mapping in gradients(case, step)] for step in range(3)]
    good = {"w": True, "m": True}
    assert finite == [[good] * 3, [good, good, {"w": True, "m": False}], [good] * 3]
    check(case, Counter())
