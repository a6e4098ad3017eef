"""Elastic jobs: what ranks that have left, joined or moved to other nodes take over, for policies, two levels and sums."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import grace_ext
from grace_ext.checkpoints import elastic
from grace_ext.driver.driver import Driver
from grace_ext.exchange.transport import Transport
from grace_ext.testing.worlds import NUMPY, same_bits, states

from ..driver.hub import OPS
from .test_load import LEVELS, NESTED, SHAPES, after, cluster_of, step


def in_new_world(own: list[dict | None], nodes: list[str], how: str, monkeypatch) -> list[dict]:
    """Returns what `carried_over` gives each new rank. own: their states of the old world; None for a rank that has joined."""
    size = len(own)
    barrier, said, made = threading.Barrier(size, timeout=30), [None] * size, [None] * size
    monkeypatch.setattr(elastic, "this_node", lambda: nodes[int(threading.current_thread().name)])
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}

    def run(rank: int) -> None:
        def gather(mine):
            barrier.wait()
            said[rank] = mine
            barrier.wait()
            return list(said)

        made[rank] = elastic.carried_over(gather, own[rank] and {**own[rank], "sizes": sizes}, rank, size, how)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return made


def goes_on(spec: str, made: list[dict], per_node: int) -> grace_ext.LocalCluster:
    """Returns the cluster of the new ranks, after two more steps."""
    cluster = cluster_of(spec, len(made), per_node)
    cluster.load_state_dict({"version": 1, "ranks": made})
    for number in (3, 4):
        assert all(np.isfinite(x).all() for x in step(cluster, number).values())
    return cluster


@pytest.mark.parametrize("how", ["mean", "keep", "reset"])
@pytest.mark.parametrize("spec", [*LEVELS[:4], LEVELS[-1], *NESTED[:3]])
def test_more_ranks_on_more_nodes(spec, how, monkeypatch):
    """Every new rank is on its own node, not on that of the rank whose state told it the step; spec, seed and step come along."""
    old = after(spec, 3, 4, 2).state_dict()["ranks"]
    made = in_new_world([*old, None, None], ["x", "x", "y", "y", "z", "z"], how, monkeypatch)
    assert [(state["rank"], state["size"], state["step"], state["seed"], state["op"]) for state in made] == [
        (rank, 6, 3, 0, "mean") for rank in range(6)
    ]
    goes_on(spec, made, 2)


def test_a_rank_of_a_node_has_died(monkeypatch):
    """The other rank of its node has the node's memory, so that nothing is lost; of a node that is gone all is lost."""
    saved = after(LEVELS[0], 3, 4, 2)
    old, key = saved.state_dict()["ranks"], "a"
    held = [{name: np.float64(x) for name, x in state.items() if name.endswith(f"/{key}")} for state in states(saved, NUMPY)]
    made = in_new_world([old[1], old[2], old[3]], ["x", "y", "y"], "mean", monkeypatch)
    for name in held[0]:
        np.testing.assert_allclose(made[0]["state"][name], (held[0][name] + held[2][name]) / 2, rtol=1e-6)
    made = in_new_world([old[2], old[3]], ["y", "y"], "mean", monkeypatch)
    for name in held[0]:
        np.testing.assert_allclose(made[0]["state"][name], held[2][name] / 2, rtol=1e-6)
    goes_on(LEVELS[0], made, 2)


def test_the_same_ranks_keep_all(monkeypatch):
    saved = after(LEVELS[0], 3, 4, 2)
    made = in_new_world(saved.state_dict()["ranks"], ["x", "x", "y", "y"], "mean", monkeypatch)
    other = cluster_of(LEVELS[0], 4, 2)
    other.load_state_dict({"version": 1, "ranks": made})
    assert same_bits(step(other, 3), step(saved, 3))


class Alone(Transport):
    """One rank of a job of `size`, which exchanges nothing here."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.ops = rank, size, OPS

    def start(self, collective, name):
        raise NotImplementedError

    def wait(self, handle):
        raise NotImplementedError


@pytest.mark.parametrize(("divisor", "share"), [(None, 1.0), (1, 0.5)])
def test_one_rank_that_gets_another(divisor, share, monkeypatch):
    """On one rank mean and sum give the same, but with a second rank the memory of a sum must be divided among them."""
    ((own,),) = (after("topk(ratio=0.1) + residual", 3, 1).state_dict()["ranks"],)
    driver = Driver(grace_ext.grace("topk(ratio=0.1) + residual"), OPS, Alone(0, 1), divisor=divisor)
    driver.load_state_dict(own)
    alone = driver.state_dict()
    made = in_new_world([alone, None], ["x", "x"], "mean", monkeypatch)
    second = Driver(grace_ext.grace("topk(ratio=0.1) + residual"), OPS, Alone(1, 2), divisor=divisor)
    second.load_state_dict(made[1])
    for name, array in own["state"].items():
        np.testing.assert_array_equal(second.state_dict()["state"][name], np.float32(array * share))
