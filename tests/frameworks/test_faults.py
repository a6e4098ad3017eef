"""Faults of a rank on two netlab hosts, for seconds (in benchmarks/reliability/faults.py, for a minute): the other rank gets an error in
time, or training continues; and a checkpoint on a full disk. Needs root; skipped, with the reason, if hosts cannot be made.

And ranks of a Keras job that are alive and do not come: the others' waits end in time, or all ranks stop together."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from grace_ext.cli.check import tool

from .support.faults import part_ways, strike
from .support.full_disk import save_on_a_full_disk
from .support.launch import JOBS, ROOT, environment, job, launcher
from .test_jobs import cases_of, held

sys.path.insert(0, str(ROOT / "benchmarks" / "netlab"))
from netlab import Netlab, NetlabError, why_not  # noqa: E402

TIMEOUT = 15.0  # also the time that ranks on a busy machine have to connect
needs_hosts = pytest.mark.skipif(why_not() is not None, reason=f"no hosts can be made here: {why_not()}")


@pytest.fixture(scope="module")
def lab() -> Iterator[Netlab]:
    try:
        made = Netlab(2, rate="100mbit").up()
    except NetlabError as error:  # root in a container that may not make namespaces
        pytest.skip(f"no hosts can be made here: {error}")
    try:
        yield made
    finally:
        made.down()


def installed(engine: str) -> None:
    if engine != "torchrun" and (tool(engine) is None or importlib.util.find_spec("horovod") is None):
        pytest.skip(f"{engine} or Horovod is not installed: `make horovod` installs both")


@needs_hosts
@pytest.mark.parametrize(
    ("engine", "fault"),
    [("torchrun", "killed"), ("torchrun", "cut"), ("horovodrun", "killed"), ("horovodrun", "stopped"), ("mpirun", "stopped")],
)
def test_a_fault_is_an_error_within_the_timeout(lab, engine, fault, tmp_path):
    installed(engine)
    for attempt in range(4):
        (tmp_path / str(attempt)).mkdir()
        seen = strike(lab, engine, fault, tmp_path / str(attempt), timeout=TIMEOUT, lasts=25, steps=1000)
        # When a rank has ended, horovodrun ends the others, sometimes before they report their error.
        if engine != "horovodrun" or seen["errors"][0]:
            break
    assert "CollectiveError: rank 0: collective 'grace/" in seen["errors"][0] and "weights" in seen["errors"][0], seen
    assert seen["seconds"] < TIMEOUT + 12, seen
    assert all(seen["exits"]) and not seen["left"] and not seen["ended"], seen


@needs_hosts
@pytest.mark.parametrize(("engine", "fault"), [("torchrun", "stopped"), ("horovodrun", "cut")])
def test_a_short_fault_is_waited_out(lab, engine, fault, tmp_path):
    installed(engine)
    seen = strike(lab, engine, fault, tmp_path, timeout=60, lasts=3, steps=12)
    assert not any(seen["exits"]) and seen["ended"] == [0, 1] and len(seen["weights"]) == 1, seen


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root")
def test_a_full_disk_leaves_the_last_checkpoint():
    seen = save_on_a_full_disk()
    assert "CheckpointError" in seen["error"] and "No space left" in seen["error"]
    assert (seen["loaded"], seen["same"], seen["tidy"]) == ("step 1", True, True)


GLOO, MPI = "horovodrun", "horovodrun --mpi"
LOOP = "every(3, none, topk(ratio=0.1) + residual)"  # has the exchange of loop.py
SOON = 4.0


@pytest.mark.parametrize(
    ("engine", "what", "how", "named"),
    [
        (GLOO, "stops early", "graph", "'grace/0/0/1/gather.0' of sequential/dense_1/bias, "),
        (MPI, "stops early", "graph", "'grace/0/0/1/gather.0' of sequential/dense_1/bias, "),
        (GLOO, "stops early", LOOP, "'grace/0/0/1/sum-float32.0' of sequential/dense_1/bias, "),
        (GLOO, "stops early", "eager", "'grace/0/0/1/gather.0'"),
        (GLOO, "has fewer batches", "graph", "'grace/0/0/1/gather.0'"),
        (GLOO, "averages no metrics", "graph", "'hvd.callbacks.MetricAverageCallback'"),
    ],
)
def test_a_rank_of_keras_that_does_not_come_ends_the_wait(engine, what, how, named, tmp_path):
    seen = part_ways(engine, what, tmp_path, how, timeout=SOON)
    assert SOON - 1 < seen["seconds"] < SOON + 8 and seen["exit"] and not seen["left"], seen
    assert "CollectiveError: rank 0: collective " + named in seen["logged"] and "GRACE_EXT_TIMEOUT is 4" in seen["logged"], seen
    # Eager operations and callbacks raise our error, graphs Horovod's.
    assert ("UnknownError" if how in ("graph", LOOP) and "metrics" not in what else "GRACE_EXT_TIMEOUT is 4") in seen["error"], seen


def test_a_stopped_rank_of_keras_ends_the_wait_over_gloo(tmp_path):
    seen = part_ways(GLOO, "is stopped", tmp_path, timeout=SOON)
    assert "UnknownError" in seen["error"] and SOON - 1 < seen["seconds"] < SOON + 8 and seen["exit"] and not seen["left"], seen


def test_a_stopped_rank_of_keras_ends_the_job_over_mpi(tmp_path):
    """MPI has no time limit, so that not even Horovod's shutdown ends: grace_ext ends the process."""
    seen = part_ways(MPI, "is stopped", tmp_path, timeout=SOON)
    assert "Horovod has not ended in 10 s either" in seen["logged"] and seen["seconds"] < SOON + 20, seen
    assert seen["exit"] and not seen["left"], seen


def test_ranks_of_keras_in_different_collectives_get_an_error(tmp_path):
    seen = part_ways(GLOO, "broadcasts nothing", tmp_path, timeout=SOON)
    assert "CollectiveError: rank 0: collective 'hvd.broadcast_variables' failed" in seen["error"], seen
    assert "CollectiveError: rank 1: collective 'grace/agree/0' failed" in seen["others"], seen
    assert seen["seconds"] < SOON + 8 and seen["exit"] and not seen["left"], seen


def test_an_elastic_job_of_keras_goes_on_with_a_rank_that_came_too_late(tmp_path):
    hosts = tmp_path / "hosts.sh"
    hosts.write_text("#!/bin/sh\necho localhost:2\n")
    hosts.chmod(0o755)
    horovodrun, python = launcher(GLOO, 2)[0], sys.executable
    elastic = [
        "--gloo",
        "--disable-cache",
        "--network-interfaces",
        "lo",
        "-np",
        "2",
        "--min-np",
        "2",
        "--max-np",
        "2",
        "--host-discovery-script",
        str(hosts),
    ]
    log, late = tmp_path / "log", {"GRACE_EXT_TIMEOUT": "3", "HOROVOD_STALL_CHECK_DISABLE": "1"}
    with log.open("w") as out:
        command = [horovodrun, *elastic, python, str(JOBS / "elastic_sleep_tf_job.py")]
        done = subprocess.run(command, env={**environment(), **late}, stdout=out, stderr=out, timeout=150)
    text = log.read_text()
    assert done.returncode == 0, text[-4000:]
    assert "collective 'grace/0/0/1/gather.0'" in text and "GRACE_EXT_TIMEOUT is 3" in text, text[-4000:]
    assert sorted(re.findall(r"BEGIN (\d+)", text)) == ["0", "0", "5", "5"], text[-4000:]
    ends = re.findall(r"END (\w+)", text)
    assert len(ends) == 2 and len(set(ends)) == 1, text[-4000:]


@pytest.mark.parametrize("case", cases_of("stop_tf_job.py"))
def test_synchronized_stop(case):
    assert case in held(GLOO, 2, "stop_tf_job.py")


def test_numbers_of_batches_that_nobody_knows_end_in_the_timeout(tmp_path):
    seen = part_ways(GLOO, "has fewer batches of unknown number", tmp_path, timeout=SOON)
    assert "UnknownError" in seen["error"] and "collective 'hvd.callbacks.SynchronizedStop' failed" in seen["others"], seen
    assert seen["seconds"] < SOON + 8 and seen["exit"] and not seen["left"], seen


def test_horovods_own_stall_check_works_over_gloo():
    """In Horovod as released it never finds a rank; tools/build_horovod.py changes that."""
    assert "ENDED Horovod has been shut down" in job(GLOO, 2, "stall_job.py", timeout=90)


class TestWatchdog:
    """The watchdog of TensorFlow's waits, in one process."""

    @pytest.fixture
    def watchdog(self, monkeypatch):
        module = pytest.importorskip("grace_ext.frameworks.tensorflow.watchdog", reason="needs TensorFlow and Horovod")
        monkeypatch.setenv("GRACE_EXT_TIMEOUT", "0.2")
        monkeypatch.setattr(module, "TICK", 0.1)
        self.ended, self.patience = threading.Event(), 0.2 + 1.0  # see timeouts.patience
        return module.Watchdog(self.ended.set, self.ended.set)

    def test_a_wait_that_lasts_ends_all(self, watchdog):
        began = time.monotonic()
        waiting = watchdog.begin("sums", ["w", "b"], 3, in_graph=False)
        assert self.ended.wait(20) and time.monotonic() - began > self.patience
        assert "rank 3: collective 'sums' of w, b failed: not every rank has come" in str(waiting.error())

    def test_a_wait_that_ends_and_no_wait_at_all_end_nothing(self, watchdog):
        for _ in range(8):
            waiting = watchdog.begin("sums", [], 0, in_graph=False)
            time.sleep(self.patience / 4)
            watchdog.done(waiting)
        assert not self.ended.wait(2 * self.patience) and not waiting.reason

    def test_a_graph_that_ended_by_another_error_waits_no_longer(self, watchdog):
        import tensorflow as tf

        waits = []

        @tf.function
        def step(value):
            begun = tf.numpy_function(lambda x: (waits.append(watchdog.begin("sums", [], 0, in_graph=True)), x)[1], [value], tf.float32)
            with tf.control_dependencies([begun]):
                tf.debugging.assert_less(value, 0.0)
            return begun

        with pytest.raises(tf.errors.InvalidArgumentError):
            step(tf.constant(1.0))
        assert waits and not self.ended.wait(2 * self.patience)

    def test_a_graph_that_waits_ends(self, watchdog):
        import tensorflow as tf

        @tf.function
        def step(value):
            begun = tf.numpy_function(lambda x: (watchdog.begin("sums", [], 0, in_graph=True), x)[1], [value], tf.float32)
            with tf.control_dependencies([begun]):
                return tf.numpy_function(lambda x: (self.ended.wait(20), x)[1], [value], tf.float32)

        step(tf.constant(1.0))
        assert self.ended.is_set()
