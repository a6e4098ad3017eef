"""Tests `grace-ext plan --measure` under real launchers, and 'auto' in real training (cases: jobs/auto_job.py)."""

from __future__ import annotations

import json
import re

import pytest

from .support.launch import job, launcher, run
from .test_jobs import cases_of, held_in


@pytest.mark.parametrize("engine", ["torchrun", "torchrun --no-python", "horovodrun", "mpirun"])
def test_measure(engine, tmp_path):
    """Rank 0 prints one document; it has real collectives of several sizes, and exchanges of dense and of one more spec."""
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"w": [300, 200], "b": [200]}))
    ask = ["plan", str(file), "topk(ratio=0.01) + residual", "efsignsgd + residual", "--measure", "--exchanges", "1", "--json"]
    ask += ["--host-copy", "1 GB/s"]
    program = ["grace-ext"] if "--no-python" in engine else ["-m", "grace_ext"]
    said = run([*launcher(engine, 2), *program, *ask])
    (text,) = re.findall(r'\{"model": .*\}', said)
    document = json.loads(text)
    assert document["workers"] == 2 and len(document["rows"]) == 3
    measured = [row["spec"] for row in document["rows"] if row["measured_ms"]]
    assert len(measured) == 2 and measured[0] == "none @ allreduce"
    assert all(row["step_ms"] > 0 and row["work_ms"] > 0 for row in document["rows"])
    for row in document["rows"]:  # 240,800 bytes to the host and back
        assert row["copy_ms"] == (0 if row["spec"] == "none @ allreduce" else pytest.approx(0.4816))
        assert row["step_ms"] == pytest.approx((row["measured_ms"] or row["uncalibrated_ms"]) + row["copy_ms"])
    kinds = {(kind, size) for kind, ranks, size, seconds in document["collectives"] if ranks == 2 and seconds > 0}
    assert {kind for kind, _ in kinds} == {"allreduce", "allgather", "alltoall"} and len(kinds) == 12
    fastest = min(document["rows"], key=lambda row: row["step_ms"])
    assert document["spec"] == (fastest["spec"] if fastest["gain"] >= 1.1 else "none @ allreduce")


@pytest.mark.parametrize("engine", ["torchrun", "horovodrun"])
def test_auto(engine):
    said = job(engine, 2, "auto_job.py")
    assert held_in(said) == set(cases_of("auto_job.py"))
