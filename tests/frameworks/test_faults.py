"""Faults of a rank on two netlab hosts, for seconds (in benchmarks/reliability/faults.py, for a minute): the other rank gets an error in
time, or training continues; and a checkpoint on a full disk. Needs root; skipped, with the reason, if hosts cannot be made."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

from grace_ext.cli.check import tool

from .support.faults import strike
from .support.full_disk import save_on_a_full_disk
from .support.launch import ROOT

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
