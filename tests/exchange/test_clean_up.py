"""A clean-up that fails must not hide the error that it cleans up after: that error arrives, with a note of what else failed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import types

import numpy as np
import pytest

import grace_ext
from grace_ext.checkpoints import files
from grace_ext.errors import Afterwards, CollectiveError, ParameterError, UnsupportedError
from grace_ext.exchange import lockstep
from grace_ext.exchange.effects import Collective, Start, Wait
from grace_ext.exchange.lockstep import LockstepTransport, run_lockstep
from grace_ext.exchange.perform import perform
from grace_ext.planning import models
from grace_ext.testing.worlds import NUMPY


def fails(*_, **__):
    raise OSError("the clean-up failed")


def notes(error: BaseException) -> str:
    return "; ".join(getattr(error, "__notes__", ()))


NOTE = "while cleaning up: OSError: the clean-up failed"


# --- the rule -----------------------------------------------------------------------------------------------------------
def test_every_action_is_called_and_the_error_of_the_block_arrives():
    done = []
    with pytest.raises(ParameterError, match="the real one") as raised, Afterwards(fails, lambda: done.append(1), fails):
        raise ParameterError("the real one")
    assert done == [1] and notes(raised.value) == f"{NOTE}; {NOTE}"


def test_the_first_failing_action_arrives_if_the_block_did_not_fail():
    done = []
    with pytest.raises(OSError, match="the clean-up failed") as raised, Afterwards(fails, lambda: done.append(1), fails):
        pass
    assert done == [1] and notes(raised.value) == NOTE
    with Afterwards(lambda: done.append(2)):
        pass
    assert done == [1, 2]


@pytest.mark.parametrize("end", [GeneratorExit, SystemExit])
def test_what_only_ends_a_block_hides_no_failing_action(end):
    with pytest.raises(OSError, match="the clean-up failed"), Afterwards(fails):
        raise end


# --- where it is kept ---------------------------------------------------------------------------------------------------
def one_collective(closes=fails):
    try:
        yield Start("here", Collective("allreduce", np.ones(3, np.float32), 1, None, None, "here"), ())
        yield Wait("here", ())
    finally:
        closes()


class Breaks(LockstepTransport):
    def start(self, collective, name):
        raise RuntimeError("the network broke")


def test_an_engines_error():
    """An exchange that cannot be closed after an engine's error: the engine's error arrives."""
    with pytest.raises(CollectiveError, match="the network broke") as raised:
        perform(one_collective(), Breaks(0, 2, NUMPY.ops, 1), {})
    assert NOTE in notes(raised.value)


def test_a_rank_of_a_cluster(monkeypatch):
    """All ranks are closed, whatever closing the first one raises."""
    closed = []

    def broken(*_):
        raise RuntimeError("the network broke")

    monkeypatch.setattr(lockstep, "_by_group", broken)
    ranks = [one_collective(), one_collective(lambda: closed.append(1))]
    with pytest.raises(RuntimeError, match="the network broke") as raised:
        run_lockstep(ranks, NUMPY.ops, 1)
    assert closed == [1] and NOTE in notes(raised.value)


def test_a_step_that_is_measured(monkeypatch):
    """Metrics stand between the driver and the engine."""
    cluster = grace_ext.LocalCluster("none", 1)
    cluster.measure(every=1)
    driver = cluster.drivers[0]
    driver.transport = Breaks(0, 2, NUMPY.ops, 1)
    with pytest.raises(CollectiveError, match="the network broke") as raised:
        perform(driver.observer.effects(one_collective()), driver.transport, {})
    assert NOTE in notes(raised.value)


def test_a_checkpoints_file(monkeypatch, tmp_path):
    """A disk that is full, and then read-only."""

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(files.Path, "unlink", fails)
    with pytest.raises(OSError, match="No space left") as raised:
        files.write(tmp_path / "state", b"bytes")
    assert NOTE in notes(raised.value)


def test_a_users_model(monkeypatch):
    """What a model's code has printed cannot be written: its own error arrives, and stdout and the arguments are what they were."""
    calls = []

    def flush():
        calls.append(1)
        if len(calls) > 1:
            fails()

    monkeypatch.setattr(models, "_flush", flush)
    arguments, stdout = sys.argv, os.fstat(1)
    with pytest.raises(ZeroDivisionError) as raised, models.on_its_own():
        1 / 0  # noqa: B018
    assert NOTE in notes(raised.value) and sys.argv is arguments and os.fstat(1) == stdout
    ctypes.CDLL(None).fflush(None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_command():
    """An error of a command whose output cannot be written either."""
    code = (
        "import sys\nfrom grace_ext.cli import app\nfrom grace_ext.errors import GraceError\n"
        "def command():\n    sys.stdout.write('some output')\n    raise GraceError('the real one')\n"
        "app.app = command\napp.main()"
    )
    with open("/dev/full", "w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert done.returncode and "grace-ext: the real one" in done.stderr, done


@pytest.mark.parametrize("engine", ["torch", "tensorflow"])
def test_leaving_the_job(monkeypatch, engine):
    """A tool that fails in a job whose engine cannot be shut down any more."""
    from grace_ext.frameworks import launched

    if engine == "torch":
        from grace_ext.frameworks.torch import engine as torch_engine

        monkeypatch.setattr(torch_engine, "api", types.SimpleNamespace(init=lambda: None, shutdown=fails, global_process_set=None))
        monkeypatch.setattr(torch_engine, "transport", lambda *_: None)
        job = launched._torch()
    else:
        hvd = types.SimpleNamespace(init=lambda: None, shutdown=fails, global_process_set=None)
        monkeypatch.setitem(sys.modules, "horovod.tensorflow", hvd)
        monkeypatch.setattr("horovod.tensorflow", hvd, raising=False)
        monkeypatch.setitem(sys.modules, "grace_ext.frameworks.tensorflow.graph", types.SimpleNamespace(HorovodTransport=lambda *_: None))
        job = launched._tensorflow()
    next(job)
    with pytest.raises(UnsupportedError, match="the real one") as raised:
        job.throw(UnsupportedError("the real one"))
    assert NOTE in notes(raised.value)


def test_joining_a_job(monkeypatch):
    """init(comm=...) that is refused, by a world that cannot be left."""
    from grace_ext.frameworks.torch.dist import world

    world.shutdown()
    shutdown = world.shutdown

    def shut_down_and_fail():
        shutdown()
        fails()

    monkeypatch.setattr(world, "shutdown", shut_down_and_fail)
    with pytest.raises(UnsupportedError, match="one job of all 1 ranks") as raised:
        world.init(comm=[0, 1])
    assert NOTE in notes(raised.value)


def test_leaving_a_job_that_was_left_already():
    """hvd.shutdown() in a script's own clean-up, after the script has ended torch's process groups and made another: nothing is raised."""
    code = (
        "import torch.distributed as dist, grace_ext.frameworks.torch.dist.api as hvd\n"
        "def join():\n    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "join()\nhvd.init()\ndist.destroy_process_group()\njoin()\n"
        "try:\n    raise ZeroDivisionError('the real one')\nfinally:\n    hvd.shutdown()\n    assert not hvd.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert done.stderr.rstrip().endswith("ZeroDivisionError: the real one"), done


def test_ranks_that_disagree_over_mpi(monkeypatch):
    """The communicator cannot be freed after ranks passed different `op`."""
    mpi = pytest.importorskip("grace_ext.frameworks.numpy.mpi")
    comm = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 2, Free=fails, allgather=lambda said: [said, {"op": "sum"}])
    monkeypatch.setattr(mpi, "load_mpi", lambda: types.SimpleNamespace(Is_finalized=lambda: False))
    monkeypatch.setattr(mpi, "duplicated", lambda _: comm)
    with pytest.raises(grace_ext.errors.DisagreementError, match="combine gradients differently") as raised:
        mpi.Exchange("none")
    assert NOTE in notes(raised.value)
