"""Compression under torchft: replicas of a job are killed and join, with real processes and torchft's lighthouse."""

from __future__ import annotations

import time

import numpy as np
import pytest

from .support.torchft import Replicas, replay

#: Seconds from the death of a replica to the next step that counts: 0.6 on a machine that is idle, and below the sum of the timeouts (of
#: the group, 10 s, and of the heartbeats, 1.5 s) in any case.
WITHIN = 20.0


def kill_and_join(replicas: Replicas, count: int) -> tuple[float, list[int]]:
    """Trains with this many replicas, of which the last kills itself in the backward pass of step 10, and lets another join. Returns how
    many seconds after the death the others went on, and the names of those that are alive at the end."""
    dies, joins = count - 1, count
    for name in range(dies):
        replicas.start(name)
    replicas.start(dies, "die:10")
    replicas.until("the death", lambda: replicas.running[dies].poll() is not None, (dies,))
    died, others = time.time(), range(dies)
    replicas.until("steps of the others", lambda: replicas.last(*others) > 14, (dies,))
    went_on = min(step.time for step in replicas.steps(*others) if step.about.step >= 10) - died
    replicas.start(joins)
    replicas.until("steps of the one that joins", lambda: len(replicas.steps(joins)) > 8, (dies,))
    alive = [*others, joins]
    replicas.stop(*alive)
    return went_on, alive


def check_agreement(replicas: Replicas) -> None:
    """Checks that after each step all replicas that counted it had the same bits."""
    steps = replicas.steps()
    for number in range(replicas.last() + 1):
        assert len({step.digest for step in steps if step.about.step == number}) == 1, number


@pytest.mark.parametrize(("mode", "spec"), [("sync", "randomk(ratio=0.25) + residual"), ("async", "fp16 + residual")])
def test_one_of_three_is_killed_and_another_joins(tmp_path, mode, spec):
    with Replicas(tmp_path, mode, 2, spec) as replicas:
        went_on, alive = kill_and_join(replicas, 3)
    assert went_on < WITHIN
    check_agreement(replicas)
    after = [step.about for step in replicas.steps(0, 1) if 10 <= step.about.step <= 14]
    assert {(about.size, about.takes_part) for about in after} == {(2, True)}
    assert max(step.about.size for step in replicas.steps(3)) == 3
    assert any("2 of 3 replicas go on" in line and "is lost" in line for line in replicas.said(0) + replicas.said(1))
    assert any("starts at zero" in line for line in replicas.said(3))
    reference = replay(spec, replicas.gave(), replicas.steps())
    for name in alive:
        for key, x in np.load(tmp_path / f"{name}.npz").items():  # three summands are added in another order
            assert np.allclose(x, reference[key], rtol=1e-4, atol=1e-5), key


def check_bits(replicas: Replicas, alive: list[int], spec: str) -> None:
    """Checks that these replicas have the bits of LocalCluster."""
    check_agreement(replicas)
    reference = replay(spec, replicas.gave(), replicas.steps())
    for name in alive:
        for key, x in np.load(replicas.folder / f"{name}.npz").items():
            assert x.tobytes() == reference[key].tobytes(), key


@pytest.mark.parametrize(("mode", "spec"), [("sync", "scaled_int + residual"), ("async", "powersgd(rank=2) + residual")])
def test_one_of_two_is_killed_and_another_joins_bit_for_bit(tmp_path, mode, spec):
    with Replicas(tmp_path, mode, 1, spec) as replicas:
        went_on, alive = kill_and_join(replicas, 2)
    assert went_on < WITHIN
    check_bits(replicas, alive, spec)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_steps_that_do_not_count(tmp_path, mode):
    """After step 10, which it has not counted, a replica gets the model of the other, and its memory starts anew. Step 14, which none has
    counted, is made again with the memories from before it."""
    spec = "powersgd(rank=2) + residual"
    with Replicas(tmp_path, mode, 1, spec) as replicas:
        replicas.start(0, "refuse:14")
        replicas.start(1, "refuse:10", "refuse:14")
        replicas.until("steps of both", lambda: min(replicas.last(0), replicas.last(1)) > 20)
        replicas.stop(0, 1)
    assert [sum(g.step == number and g.name == 0 for g in replicas.gave()) for number in (13, 14, 15)] == [1, 2, 1]
    assert any("at step 11" in line and "starts at zero" in line for line in replicas.said(1))
    check_bits(replicas, [0, 1], spec)
