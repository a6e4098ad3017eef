"""Compression under torchft: replicas of a job are killed and join, with real processes and torchft's lighthouse."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchft

import grace_ext
import grace_ext.frameworks.torch as hvd
from grace_ext.errors import ParameterError, UnsupportedError
from grace_ext.frameworks.torch.devices import ops_for
from grace_ext.frameworks.torch.quorum import GroupTransport, QuorumState
from grace_ext.integrations.torchft import DistributedDataParallel
from grace_ext.testing import transport_contract

from .support.torchft import Replicas, replay

#: Seconds from the death of a replica to the next step that counts. The lighthouse waits 1.5 s for its heartbeats, and a busy machine takes
#: its time.
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


def check_bits(replicas: Replicas, alive: list[int], spec: str) -> None:
    """Checks that all replicas had the same bits after each step, and that these have LocalCluster's bits at the end."""
    steps = replicas.steps()
    for number in range(replicas.last() + 1):
        assert len({step.digest for step in steps if step.about.step == number}) == 1, number
    reference = replay(spec, replicas.gave(), steps)
    for name in alive:
        for key, x in np.load(replicas.folder / f"{name}.npz").items():
            assert x.tobytes() == reference[key].tobytes(), key


@pytest.mark.parametrize(("mode", "spec"), [("sync", "scaled_int + residual"), ("async", "fp16 + residual")])
def test_one_of_three_is_killed_and_another_joins(tmp_path, mode, spec):
    """These specs' sums are added in rank order, so the bits are LocalCluster's for any number of replicas."""
    with Replicas(tmp_path, mode, 2, spec) as replicas:
        went_on, alive = kill_and_join(replicas, 3)
    assert went_on < WITHIN
    after = [step.about for step in replicas.steps(0, 1) if 10 <= step.about.step <= 14]
    assert {(about.size, about.takes_part) for about in after} == {(2, True)}
    assert max(step.about.size for step in replicas.steps(3)) == 3
    assert any("2 of 3 replicas go on" in line and "is lost" in line for line in replicas.said(0) + replicas.said(1))
    assert any("starts at zero" in line for line in replicas.said(3))
    check_bits(replicas, alive, spec)


@pytest.mark.parametrize(("mode", "spec"), [("sync", "randomk(ratio=0.25) + residual"), ("async", "powersgd(rank=2) + residual")])
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


# --- without a lighthouse ---------------------------------------------------------------------------------------------
STORE = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
CPU = ops_for(torch.device("cpu"))


def groups(size: int) -> list[torchft.ProcessGroupGloo]:
    """Returns a process group of torchft for each of these ranks."""
    made = [torchft.ProcessGroupGloo(timeout=timedelta(seconds=20)) for _ in range(size)]
    place = f"localhost:{STORE.port}/{id(made)}"
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda rank: made[rank].configure(place, str(rank), rank, size), range(size)))
    return made


TestContract = transport_contract(lambda size: [GroupTransport(CPU, group, rank, size) for rank, group in enumerate(groups(size))])


class Counting:
    """A manager of one replica, whose steps count if the test says so."""

    def __init__(self):
        self.step, self._quorum_id, self.error = 0, 1, None
        for name, result in {"wait_quorum": None, "is_participating": True, "num_participants": 1}.items():
            setattr(self, name, lambda result=result: result)

    def register_state_dict_fn(self, key, load, save):
        self.load = load

    def current_step(self):
        return self.step

    def errored(self):
        return self.error

    def report_error(self, error):
        self.error = error

    def commit(self, counts=True):
        self.step, self.error, self._quorum_id = self.step + counts, None, self._quorum_id + (not counts)


def one_replica(manager: Counting, spec: str) -> tuple[torch.nn.Module, QuorumState]:
    """Returns a model and the state of its hook, which compresses as the only replica."""
    torch.manual_seed(0)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 6), process_group=torchft.process_group.ProcessGroupDummy(0, 1))
    state = QuorumState(manager, groups(1)[0], grace_ext.grace(spec), ddp, None, True)
    ddp.register_comm_hook(state, lambda state, bucket: state.take(bucket))
    return ddp, state


def pushed(ddp: torch.nn.Module, seed: int) -> torch.Tensor:
    """Makes a backward pass, and returns what became of the weight's gradient."""
    ddp.zero_grad()
    ddp(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    return ddp.module.weight.grad.clone()


def trained(manager: Counting, state: QuorumState, ddp: torch.nn.Module, steps: list[tuple[int, bool]]) -> torch.Tensor:
    """Makes these steps, given by seed and whether they count. Returns what became of the last gradient."""
    for seed, counts in steps:
        last = pushed(ddp, seed)
        manager.commit(counts)
    return last


def test_the_memory_follows_the_steps_that_count():
    """A step that does not count leaves no trace, and a checkpoint of the memory resumes, whatever the number of replicas was."""
    spec = "powersgd(rank=1) + residual"
    manager = Counting()
    ddp, state = one_replica(manager, spec)
    trained(manager, state, ddp, [(1, False), (1, True), (2, True), (3, True), (4, False)])
    saved = state.state_dict()
    last = trained(manager, state, ddp, [(4, True)])
    assert saved["step"] == 3
    other = Counting()
    ddp, state = one_replica(other, spec)
    assert torch.equal(trained(other, state, ddp, [(seed, True) for seed in (1, 2, 3, 4)]), last)
    resumed = Counting()
    ddp, state = one_replica(resumed, spec)
    state.load_state_dict({**saved, "size": 3, "rank": 2})
    assert torch.equal(trained(resumed, state, ddp, [(4, True)]), last)


def test_a_failed_exchange_is_told_to_the_manager():
    """Nothing is raised, DDP gets its buckets back, and the step is made again in the group that the manager has made anew."""
    spec = "powersgd(rank=1) + residual"
    manager, other = Counting(), Counting()
    ddp, state = one_replica(manager, spec)
    trained(manager, state, ddp, [(1, True)])
    state._session().driver.transport._group = Broken()
    pushed(ddp, 2)
    assert "connection closed" in str(manager.error)
    manager.commit(counts=False)
    last = trained(manager, state, ddp, [(2, True)])
    ddp, state = one_replica(other, spec)
    assert torch.equal(trained(other, state, ddp, [(1, True), (2, True)]), last)


class Broken:
    """A process group whose peer has died."""

    def allreduce(self, *_):
        raise RuntimeError("connection closed by peer")


@pytest.fixture
def manager():
    made = torchft.Manager.__new__(torchft.Manager)  # without servers
    made._pg, made._load_state_dict_fns, made._user_state_dicts = torchft.ProcessGroupGloo(), {}, {}
    return made


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("topk(ratio=0.1) + residual", "summed by all-reduce"),
        ("signsgd @ allreduce", "summed by all-reduce"),
        ("powersgd(rank=2) + residual @ hierarchical", "communicator 'hierarchical'"),
        ("warmup(steps=10, then=powersgd(rank=2) + residual)", "one spec"),
        ("none + ef21", "use memory 'residual'"),
        ("gaussian(clip=1.0, noise_multiplier=1.0, unit='rank') | none", "does not make gradients private"),
    ],
)
def test_what_cannot_change_its_ranks_is_refused(manager, spec, text):
    with pytest.raises(UnsupportedError, match=text):
        DistributedDataParallel(manager, torch.nn.Linear(2, 2), spec)


def test_uses_that_cannot_be_right_are_refused(manager):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ParameterError, match="torchft.Manager first"):
        DistributedDataParallel(model, manager, "none")
    with pytest.raises(ParameterError, match="leave it out"):
        DistributedDataParallel(manager, model, "none", find_unused_parameters=False)
    group, manager._pg = manager._pg, torchft.ProcessGroupBabyNCCL.__new__(torchft.ProcessGroupBabyNCCL)
    with pytest.raises(UnsupportedError, match="ProcessGroupBabyNCCL"):
        DistributedDataParallel(manager, model, "none")
    manager._pg = group
    ddp = DistributedDataParallel(manager, model, "none")
    with pytest.raises(UnsupportedError, match="one module"):
        DistributedDataParallel(manager, torch.nn.Linear(2, 2), "none")
    for exchanged in (ddp, torchft.DistributedDataParallel(manager, torch.nn.Linear(2, 2))):
        with pytest.raises(UnsupportedError, match="for torchft, use grace_ext.integrations.torchft"):
            hvd.compress_ddp("none", exchanged)
    with pytest.raises(UnsupportedError, match="report_error"):
        ddp.state.undo()
    with pytest.raises(UnsupportedError, match="each replica's own checkpoint"):
        grace_ext.save(ddp.state, "unused")
