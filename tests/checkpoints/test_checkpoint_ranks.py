"""grace_ext.save and load on several ranks: a failure on one rank raises on all ranks, and changes nothing on any."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import grace_ext
from grace_ext.checkpoints import files as checkpoint_files
from grace_ext.checkpoints.saveable import saveable_by
from grace_ext.driver.driver import Driver
from grace_ext.errors import CheckpointError
from grace_ext.exchange.transport import Transport

from ..driver.hub import OPS
from . import resume_matrix
from .test_checkpoint import SPEC, bits, trained


class Together(Transport):
    """Performs all-gathers between ranks that are threads."""

    gathers_uneven = True

    def __init__(self, rank: int, arrays: list, barrier: threading.Barrier):
        self.rank, self.size, self.ops, self._arrays, self._barrier = rank, len(arrays), OPS, arrays, barrier

    def start(self, collective, name):
        self._arrays[self.rank] = collective.array.copy()

    def wait(self, handle):
        self._barrier.wait()
        gathered = list(self._arrays)
        self._barrier.wait()
        return gathered


class Holder:
    """Holds a rank's driver with the state of the same rank in a cluster."""

    def __init__(self, transport: Together, cluster: grace_ext.LocalCluster):
        self.driver = Driver(cluster.grace, OPS, transport)
        self.driver.register(cluster.drivers[0].specs.values())
        self.driver.load_state_dict(cluster.state_dict()["ranks"][transport.rank])

    def _saveable(self):
        return saveable_by(self.driver.transport, self.driver.state_dict, self.driver.read_state, self.driver.load_state_dict)

    def bits(self) -> dict[str, bytes]:
        return {key: x.tobytes() for key, x in self.driver.state_dict()["state"].items()}


def on_all(clusters, call) -> tuple[list[Holder], list]:
    """Runs `call(holder, rank)` on each rank in a thread. Returns the holders, and the results or exceptions."""
    size = len(clusters)
    arrays, barrier, outcomes = [None] * size, threading.Barrier(size, timeout=60), [None] * size
    holders = [Holder(Together(rank, arrays, barrier), cluster) for rank, cluster in enumerate(clusters)]

    def run(rank: int) -> None:
        try:
            outcomes[rank] = call(holders[rank], rank)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return holders, outcomes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_all_said(outcomes, *texts: str) -> None:
    assert {type(outcome) for outcome in outcomes} == {CheckpointError}, outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert all(text in str(outcomes[0]) for text in texts), outcomes[0]


def test_each_rank_writes_its_own_file(tmp_path):
    three = trained(3)
    _, outcomes = on_all([three] * 2, lambda holder, rank: grace_ext.save(holder, tmp_path))
    assert outcomes == [None, None]
    holders, outcomes = on_all([trained(1)] * 2, lambda holder, rank: grace_ext.load(holder, tmp_path))
    assert outcomes == [3, 3] and [holder.bits() for holder in holders] == bits(three)
    again = resume_matrix.cluster_of(SPEC)  # one process can load all ranks
    assert grace_ext.load(again, tmp_path) == 3 and bits(again) == bits(three)


def test_a_disk_that_is_full_on_one_rank(tmp_path, monkeypatch):
    on_all([trained(3)] * 2, lambda holder, rank: grace_ext.save(holder, tmp_path))
    before, write = files(tmp_path), checkpoint_files.write

    def full(path, data):
        if path.name.startswith("rank-00001"):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint_files, "write", full)
    _, outcomes = on_all([trained(4)] * 2, lambda holder, rank: grace_ext.save(holder, tmp_path))
    assert_all_said(outcomes, "rank 1", "No space left")
    assert files(tmp_path) == before


def test_a_manifest_that_cannot_be_written(tmp_path, monkeypatch):
    """Only rank 0 writes the manifest. If that fails, the new files stay until the next save, because the rename may have happened."""
    on_all([trained(3)] * 2, lambda holder, rank: grace_ext.save(holder, tmp_path))
    write = checkpoint_files.write

    def full(path, data):
        if path.name == checkpoint_files.MANIFEST:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint_files, "write", full)
    _, outcomes = on_all([trained(4)] * 2, lambda holder, rank: grace_ext.save(holder, tmp_path))
    assert_all_said(outcomes, "rank 0", "No space left")
    assert grace_ext.load(resume_matrix.cluster_of(SPEC), tmp_path) == 3
    monkeypatch.undo()
    on_all([trained(5)] * 2, lambda holder, rank: grace_ext.save(holder, tmp_path))
    assert grace_ext.load(resume_matrix.cluster_of(SPEC), tmp_path) == 5 and len(files(tmp_path)) == 3


def test_hosts_without_a_common_folder(tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    _, outcomes = on_all([trained(3)] * 2, lambda holder, rank: grace_ext.save(holder, folders[rank]))
    assert_all_said(outcomes, "rank-00001-of-00002", "all hosts share")
    for folder, steps in zip(folders, (3, 4), strict=True):
        grace_ext.save(trained(steps), folder)
    holders, outcomes = on_all([trained(1)] * 2, lambda holder, rank: grace_ext.load(holder, folders[rank]))
    assert_all_said(outcomes, "different checkpoints", "share")
    assert [holder.bits() for holder in holders] == bits(trained(1))


def test_ranks_at_different_steps_cannot_save(tmp_path):
    _, outcomes = on_all([trained(3), trained(4)], lambda holder, rank: grace_ext.save(holder, tmp_path))
    assert_all_said(outcomes, "not at the same step")
    assert files(tmp_path) == {}


def test_one_damaged_file_changes_no_rank(tmp_path):
    grace_ext.save(trained(3), tmp_path)
    victim = next(tmp_path.glob("rank-00001*"))
    victim.write_bytes(victim.read_bytes()[:-4])
    holders, outcomes = on_all([trained(1)] * 2, lambda holder, rank: grace_ext.load(holder, tmp_path))
    assert_all_said(outcomes, "rank 1", "damaged")
    assert [holder.bits() for holder in holders] == bits(trained(1))


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2)])
def test_other_numbers_of_ranks(tmp_path, old, new, caplog):
    cluster = trained(3, old)
    grace_ext.save(cluster, tmp_path)
    holders, outcomes = on_all([trained(1, new)] * new, lambda holder, rank: grace_ext.load(holder, tmp_path))
    expected = resume_matrix.cluster_of(SPEC, new)
    grace_ext.load(expected, tmp_path)
    assert outcomes == [3] * new and [holder.bits() for holder in holders] == bits(expected)
    assert len(caplog.records) == 2  # once by rank 0, and once by the cluster
